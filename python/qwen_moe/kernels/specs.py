"""The table of kernels that are compiled ahead of time.

Sizes of the model are arguments, so one table serves every model. What is fixed at compile time
is a weight format, a tile of work, and promises about alignment.

A type is `*element` for a pointer (16-byte aligned unless `/bytes` follows) or `i32`, `i64`, `fp32`
for a number; `/16` behind a number promises a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import (
    attention,
    attention_append,
    conv,
    delta_output,
    delta_prepare,
    delta_scan,
    dense,
    moe,
    norm,
    route,
)


@dataclass(frozen=True, slots=True)
class Spec:
    """One image.

    Attributes:
        name: Unique; what the core asks for.
        kernel: The Triton function.
        types: Of every argument at run time, in order.
        constants: Its compile-time arguments.
        warps: Of a block.
        stages: Of the software pipeline.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 3


# Weight formats by bits; a group of inputs has one scale, and is one step of a product.
FORMATS = ((4, 128), (4, 64), (8, 128), (8, 64), (16, 64))


def format_name(bits: int, group: int) -> str:
    """int4_g128, int8_g64, bf16 ..."""
    return "bf16" if bits == 16 else f"int{bits}_g{group}"


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and outputs of a block of a product.

    A row's bits do not depend on it: every tile sums in the same order.
    """

    rows: int
    outputs: int
    warps: int
    stages: int
    step: int = 128  # inputs at a time, where a group has as many

    def constants(self, bits: int, group: int, *, halves: bool = False) -> dict[str, Any]:
        """Of a kernel over weights of a format; `halves` is one that takes gates and ups."""
        return {
            "BITS": bits,
            "GROUP": group,
            "STEP": min(self.step, group),
            "BM": self.rows,
            "BN": self.outputs // 2 if halves else self.outputs,
        }


# Of dense products: the first that gives most multiprocessors a block is taken. What each is for
# was measured with benchmarks/bench_prefill_kernels.py on an H100.
TILES = (
    Tile(128, 128, 8, 4, step=64),
    Tile(128, 64, 4, 3),
    Tile(64, 64, 4, 4),
    Tile(32, 64, 4, 4),
    Tile(16, 64, 4, 4),
)


def dense_tile(tile: Tile, bits: int) -> Tile:
    """The tile as a format takes it: widening int8 is quicker with more of it in each warp."""
    large = (tile.rows, tile.outputs) == (128, 128)
    return replace(tile, warps=4) if large and bits == 8 else tile


# Of experts, by the rows that one has on average.
EXPERT_TILES = (
    Tile(16, 128, 4, 4),
    Tile(32, 128, 4, 4, step=64),
    Tile(64, 128, 4, 4, step=64),
    Tile(128, 128, 8, 4, step=64),
)


def _dense() -> list[Spec]:
    table = []
    plain, residual = {"RESIDUAL": False, "GATED": False}, {"RESIDUAL": True, "GATED": False}
    wide = {**dense.TYPES, "out": "*fp32"}
    kinds: list[tuple[str, Mapping[str, str], dict[str, Any]]] = [
        ("project", dense.TYPES, plain),
        ("project_residual", wide, residual),
        ("project_gated", wide, {**residual, "GATED": True}),
    ]
    for bits, group in FORMATS:
        name = format_name(bits, group)
        for tile in (dense_tile(tile, bits) for tile in TILES):
            size = f"{name}_{tile.rows}x{tile.outputs}"
            launch = {"warps": tile.warps, "stages": tile.stages}
            shape, halves = tile.constants(bits, group), tile.constants(bits, group, halves=True)
            table += [
                Spec(f"{kind}_{size}", dense.project, types, {**shape, **flags}, **launch)
                for kind, types, flags in kinds
            ]
            table.append(
                Spec(f"project_pair_{size}", dense.project_pair, dense.PAIR_TYPES, halves, **launch)
            )
    return table


def _narrow() -> list[Spec]:
    flags = {"RESIDUAL": False, "GATED": False}
    return [
        Spec(
            f"project_narrow_{tile.rows}",
            dense.project,
            dense.NARROW_TYPES,
            {**tile.constants(16, 64), "STEP": tile.step, **flags},
            warps=tile.warps,
            stages=tile.stages,
        )
        for tile in (Tile(64, 64, 4, 3, step=64), Tile(32, 64, 4, 4))
    ]


def _rows() -> list[Spec]:
    return [
        Spec(f"rms_norm_{block}", norm.rms_norm, norm.TYPES, {"BLOCK": block}, warps=8)
        for block in (2048, 4096, 8192)
    ]


def _gated_delta() -> list[Spec]:
    return [
        Spec("conv_silu_norm", conv.conv_silu_norm, conv.TYPES, {"BT": 64, "DIM": 128}, warps=8),
        Spec("conv_window", conv.conv_window, conv.WINDOW_TYPES, {"BLOCK": 256}),
        Spec(
            "delta_prepare",
            delta_prepare.delta_prepare,
            delta_prepare.TYPES,
            {"DIM": 128, "PRECISION": "tf32"},
            stages=1,
        ),
        Spec(
            "delta_scan",
            delta_scan.delta_scan,
            delta_scan.TYPES,
            {"DIM": 128, "BV": 32},
            stages=3,
        ),
        Spec(
            "delta_output",
            delta_output.delta_output,
            delta_output.TYPES,
            {"DIM": 128},
            stages=1,
        ),
    ]


def _attention() -> list[Spec]:
    return [
        Spec(
            "attention_append",
            attention_append.attention_append,
            attention_append.TYPES,
            {"BT": 4, "DIM": 256},
        ),
        Spec(
            "attention",
            attention.attention,
            attention.TYPES,
            {"BM": 128, "BN": 64, "DIM": 256},
            warps=8,
            stages=2,
        ),
        Spec(  # for GPUs with less shared memory
            "attention_small",
            attention.attention,
            attention.TYPES,
            {"BM": 64, "BN": 32, "DIM": 256},
            stages=2,
        ),
    ]


ROUTE_TOKENS = (4, 16)  # of a block of top_experts, for few tokens and for many
SORT_PICKS = 256  # of a block of sort_picks


def _routed() -> list[Spec]:
    table = []
    for experts in (64, 256, 512):
        sizes = {"EXPERTS": experts}
        table += [
            Spec(
                f"top_experts_{experts}_{top}_{tokens}",
                route.top_experts,
                route.TOP_TYPES,
                {"BT": tokens, **sizes, "TOP": top},
                warps=8,
            )
            for top in (8, 16)
            for tokens in ROUTE_TOKENS
        ]
        table.append(
            Spec(
                f"plan_experts_{experts}",
                route.plan_experts,
                route.PLAN_TYPES,
                {**sizes, "BLOCKS": 32},
            )
        )
    table.append(Spec("sort_picks", route.sort_picks, route.SORT_TYPES, {"BLOCK": SORT_PICKS}))
    for bits, group in FORMATS:
        for tile in EXPERT_TILES:
            name = f"{format_name(bits, group)}_m{tile.rows}"
            launch = {"warps": tile.warps, "stages": tile.stages}
            table += [
                Spec(
                    f"expert_gate_up_{name}",
                    moe.expert_gate_up,
                    moe.GATE_UP_TYPES,
                    tile.constants(bits, group, halves=True),
                    **launch,
                ),
                Spec(
                    f"expert_down_{name}",
                    moe.expert_down,
                    moe.DOWN_TYPES,
                    tile.constants(bits, group),
                    **launch,
                ),
            ]
    table.append(Spec("combine_experts", moe.combine_experts, moe.COMBINE_TYPES, {"BLOCK": 1024}))
    return table


def specs() -> list[Spec]:
    """All of them, in the order of a layer."""
    return [*_rows(), *_dense(), *_narrow(), *_gated_delta(), *_attention(), *_routed()]
