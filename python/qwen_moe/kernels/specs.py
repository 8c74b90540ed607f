"""The table of kernels that are compiled ahead of time.

Sizes of the model are arguments, so one table serves every model. What is fixed at compile time
is a weight format, a tile of work, and promises about alignment.

A type is `*element` for a pointer (16-byte aligned unless `/bytes` follows) or `i32`, `i64`, `fp32`
for a number; `/16` behind a number promises a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import dense, norm


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
    """Rows and outputs of a block of a product."""

    rows: int
    outputs: int
    warps: int
    stages: int


# By the number of rows that a product has, or that an expert has on average.
TILES = (Tile(16, 128, 4, 4), Tile(64, 128, 4, 3), Tile(128, 128, 8, 3))


def _dense() -> list[Spec]:
    table = []
    for bits, group in FORMATS:
        for tile in TILES:
            name = f"{format_name(bits, group)}_m{tile.rows}"
            shape = {"BITS": bits, "GROUP": group, "BM": tile.rows, "BN": tile.outputs}
            launch = {"warps": tile.warps, "stages": tile.stages}
            plain = {**shape, "RESIDUAL": False, "GATED": False}
            wide = {**dense.TYPES, "out": "*fp32"}
            table += [
                Spec(f"project_{name}", dense.project, dense.TYPES, plain, **launch),
                Spec(f"project_fp32_{name}", dense.project, wide, plain, **launch),
                Spec(
                    f"project_residual_{name}",
                    dense.project,
                    wide,
                    {**plain, "RESIDUAL": True},
                    **launch,
                ),
                Spec(
                    f"project_gated_{name}",
                    dense.project,
                    wide,
                    {**plain, "RESIDUAL": True, "GATED": True},
                    **launch,
                ),
                Spec(
                    f"project_pair_{name}",
                    dense.project_pair,
                    dense.PAIR_TYPES,
                    {**shape, "BN": tile.outputs // 2},
                    **launch,
                ),
            ]
        table.append(
            Spec(
                f"unpack_{format_name(bits, group)}",
                dense.unpack,
                dense.UNPACK_TYPES,
                {"BITS": bits, "GROUP": group, "BN": 128},
            )
        )
    return table


def _rows() -> list[Spec]:
    return [
        Spec(f"rms_norm_{block}", norm.rms_norm, norm.TYPES, {"BLOCK": block})
        for block in (2048, 4096, 8192)
    ]


def specs() -> list[Spec]:
    """All of them, in the order of a layer."""
    return [*_rows(), *_dense()]
