#!/usr/bin/env python3
"""Times every Triton prefill kernel at 35B-A3B shapes and checks it against torch, on one GPU.

    python3 benchmarks/bench_prefill_kernels.py [--rows 512,2048,8192] [--only X]

Needs torch and Triton, not the built core, and no network. Every kernel runs with a few
configurations, the first being that of the spec table; all are printed, so that the best can be
frozen there. A kernel that fails is reported and the others go on. With TRITON_INTERPRET=1 and
--smoke the same code runs once on the CPU with small shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Importing qwen_moe itself would want the built core.
sys.modules["qwen_moe"] = types.ModuleType("qwen_moe")
sys.modules["qwen_moe"].__path__ = [str(ROOT / "python" / "qwen_moe")]
sys.path.insert(0, str(ROOT / "tests"))

import prefill_reference as ref  # noqa: E402
from qwen_moe.kernels import (  # noqa: E402
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


@dataclass(frozen=True)
class Shape:
    """Of the model."""

    hidden: int = 2048
    key_heads: int = 16
    value_heads: int = 32
    linear_dim: int = 128
    heads: int = 16
    kv_heads: int = 2
    head_dim: int = 256
    half_rotary: int = 32
    experts: int = 256
    top_k: int = 8
    inner: int = 512
    shared: int = 512
    delta_layers: int = 30
    attention_layers: int = 10

    @property
    def layers(self) -> int:
        return self.delta_layers + self.attention_layers

    @property
    def channels(self) -> int:
        return (2 * self.key_heads + self.value_heads) * self.linear_dim

    @property
    def value_dim(self) -> int:
        return self.value_heads * self.linear_dim


SMOKE = Shape(
    hidden=256,
    key_heads=1,
    value_heads=2,
    heads=4,
    kv_heads=1,
    experts=8,
    top_k=2,
    inner=128,
    shared=128,
    delta_layers=3,
    attention_layers=1,
)


# Configurations of products: rows, outputs, warps, stages, and whether scales go into the weights.
GEMM = [
    (128, 128, 8, 3, True),
    (128, 128, 8, 4, True),
    (128, 256, 8, 3, True),
    (256, 128, 8, 3, True),
    (64, 256, 8, 3, True),
    (64, 128, 4, 3, True),
    (64, 128, 4, 4, True),
    (128, 64, 4, 3, True),
    (128, 128, 8, 3, False),
    (128, 64, 4, 3, False),
    (64, 128, 4, 4, False),
]
GEMM_BF16 = [
    (128, 128, 8, 3, False),
    (128, 128, 8, 4, False),
    (128, 256, 8, 3, False),
    (256, 128, 8, 3, False),
    (64, 128, 4, 4, False),
]
NARROW = [(64, 64, 4, 3, False), (32, 64, 4, 4, False), (128, 64, 4, 3, False)]
SMALL = [
    (16, 128, 4, 4, True),
    (16, 64, 4, 4, True),
    (32, 128, 4, 3, True),
    (32, 128, 4, 4, True),
    (16, 128, 4, 4, False),
]


@dataclass
class Variant:
    label: str
    run: Callable[[], None]


@dataclass
class Case:
    """One kernel.

    Attributes:
        count: Launches of it in the whole model.
        check: Relative error of what the last run left; runs it again where it adds.
    """

    name: str
    count: int
    variants: list[Variant]
    check: Callable[[], float]
    flops: float = 0
    bytes: float = 0


@dataclass
class Result:
    name: str
    rows: int
    count: int = 0
    config: str = ""
    us: float = 0
    tflops: float = 0
    gbs: float = 0
    error: float = 0
    tried: dict[str, float | str] = field(default_factory=dict)
    failure: str = ""


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.float(), expected.float()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def label(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


class Bench:
    def __init__(self, shape: Shape, device: str, quick: bool) -> None:
        self.s, self.device, self.quick = shape, device, quick
        self.weights: dict[str, ref.Packed] = {}

    # --- inputs

    def rows(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=self.device).to(torch.bfloat16)

    def empty(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*sizes, dtype=dtype, device=self.device)

    def floats(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device)

    def weight(self, name: str, count: int, n: int, k: int, bits: int) -> ref.Packed:
        """Kept between numbers of rows."""
        if name not in self.weights:
            self.weights[name] = ref.random_weight(count, n, k, bits, 128, self.device)
        return self.weights[name]

    def sample(self, rows: int) -> torch.Tensor:
        """Rows that a check looks at."""
        if rows <= 256:
            return torch.arange(rows, device=self.device)
        return torch.cat(
            [
                torch.randint(0, rows, (254,), device=self.device),
                torch.tensor([0, rows - 1], device=self.device),
            ]
        )

    # --- configurations

    def tiles(self, options: list[tuple[int, int, int, int, bool]]) -> list[dict[str, Any]]:
        if self.quick:
            return [{"BM": 16, "BN": 128, "FOLD": True, "num_warps": 4, "num_stages": 2}]
        return [
            {"BM": bm, "BN": bn, "FOLD": fold, "num_warps": warps, "num_stages": stages}
            for bm, bn, warps, stages, fold in options
        ]

    # --- kernels, in the order of a layer

    def rms_norm(self, t: int) -> Case:
        s = self.s
        x, w, out = self.floats(t, s.hidden), self.floats(s.hidden), self.empty(t, s.hidden)
        block = 1 << (s.hidden - 1).bit_length()

        def run(warps: int) -> Callable[[], None]:
            return lambda: norm.rms_norm[(t,)](
                out, x, w, s.hidden, 1e-6, BLOCK=block, num_warps=warps
            )

        return Case(
            "rms_norm",
            2 * s.layers,
            [Variant(f"num_warps={warps}", run(warps)) for warps in (4, 8)],
            lambda: relative(ref.from_fragment_order(out), ref.rms_norm(x, w, 1e-6)),
            bytes=6.0 * t * s.hidden,
        )

    def projection(
        self,
        name: str,
        t: int,
        n: int,
        k: int,
        bits: int,
        count: int,
        residual: bool = False,
        gated: bool = False,
        narrow: bool = False,
    ) -> Case:
        w, x = self.weight(name, 1, n, k, bits), self.rows(t, k)
        wide = residual or narrow
        out = self.empty(t, n, dtype=torch.float32 if wide else torch.bfloat16)
        gate, ordered = self.floats(t), ref.to_fragment_order(x)
        group = 64 if bits == 16 else 128

        def run(to: torch.Tensor, config: dict[str, Any]) -> None:
            dense.project[(cdiv(n, config["BN"]) * cdiv(t, config["BM"]),)](
                to,
                ordered,
                w.codes,
                w.scales,
                gate,
                t,
                n,
                k,
                w.tile_words,
                n,
                0,
                BITS=bits,
                GROUP=group,
                RESIDUAL=residual,
                GATED=gated,
                **config,
            )

        configs = self.tiles(NARROW if narrow else GEMM_BF16 if bits == 16 else GEMM)

        def check() -> float:
            at = self.sample(t)
            to = self.empty(t, n, dtype=out.dtype)
            run(to, configs[0])
            expected = x[at].float() @ w.dense[0].T
            if gated:
                expected *= gate[at].sigmoid()[:, None]
            return relative(to[at], expected)

        return Case(
            name,
            count,
            [
                Variant(label(config), lambda config=config: run(out, config))  # type: ignore[misc]
                for config in configs
            ],
            check,
            flops=2.0 * t * n * k,
            bytes=w.data.numel() + 2.0 * t * k + (8 if residual else out.element_size()) * t * n,
        )

    def shared_gate_up(self, t: int) -> Case:
        s, n, k = self.s, self.s.shared, self.s.hidden
        w, x, out = self.weight("shared", 2, n, k, 8), self.rows(t, k), self.empty(t, n)
        ordered = ref.to_fragment_order(x)

        def run(config: dict[str, int]) -> None:
            config = {**config, "BN": config["BN"] // 2}
            dense.project_pair[(n // config["BN"] * cdiv(t, config["BM"]),)](
                out,
                ordered,
                w.codes,
                w.scales,
                t,
                n,
                k,
                w.tile_words,
                n // 16 * w.tile_words,
                BITS=8,
                GROUP=128,
                **config,
            )

        def check() -> float:
            at = self.sample(t)
            gate, up = x[at].float() @ w.dense[0].T, x[at].float() @ w.dense[1].T
            return relative(ref.from_fragment_order(out)[at], torch.nn.functional.silu(gate) * up)

        return Case(
            "shared gate_up int8",
            s.layers,
            [
                Variant(label(c), lambda c=c: run(c))  # type: ignore[misc]
                for c in self.tiles(GEMM)
            ],
            check,
            flops=4.0 * t * n * k,
            bytes=w.data.numel() + 2.0 * t * (k + n),
        )

    def unpack(self, t: int) -> Case:
        """With a library's product behind it: the other way to project."""
        n, k = self.s.channels, self.s.hidden
        w, x = self.weight("in_proj qkv int4", 1, n, k, 4), self.rows(t, k)
        wide, out = self.empty(n, k), self.empty(t, n)
        ordered = ref.to_fragment_order(x)

        def unpack() -> None:
            dense.unpack[(n // 128, k // 128)](
                wide, w.codes, w.scales, n, k, w.tile_words, BITS=4, GROUP=128, BN=128
            )

        def both() -> None:
            unpack()
            torch.mm(ordered, wide.T, out=out)

        def check() -> float:
            at = self.sample(t)
            both()
            return relative(out[at], x[at].float() @ w.dense[0].T)

        return Case(
            "unpack + library in_proj qkv",
            0,
            [Variant("both", both), Variant("unpack alone", unpack)],
            check,
            flops=2.0 * t * n * k,
            bytes=w.data.numel() + 2.0 * n * k,
        )

    def convolution(self, t: int) -> Case:
        s = self.s
        proj, taps = self.rows(t, s.channels), self.floats(4, s.channels)
        window, out = self.floats(3, s.channels), self.empty(t, s.channels)

        def run(config: dict[str, int]) -> None:
            conv.conv_silu_norm[(s.channels // s.linear_dim, cdiv(t, config["BT"]))](
                out,
                proj,
                window,
                taps,
                t,
                s.channels,
                s.channels,
                s.key_heads,
                s.linear_dim**-0.5,
                DIM=s.linear_dim,
                **config,
            )

        configs = [
            {"BT": bt, "num_warps": warps} for bt, warps in ((32, 4), (16, 4), (64, 4), (64, 8))
        ]
        return Case(
            "conv_silu_norm",
            s.delta_layers,
            [Variant(label(c), lambda c=c: run(c)) for c in configs],  # type: ignore[misc]
            lambda: relative(
                out,
                ref.conv_silu_norm(
                    proj.float(), window, taps, s.key_heads * s.linear_dim, s.linear_dim
                )[0],
            ),
            bytes=4.0 * t * s.channels,
        )

    def conv_window(self, t: int) -> Case:
        s = self.s
        proj, window = self.rows(t, s.channels), self.floats(3, s.channels)

        def run() -> None:
            conv.conv_window[(cdiv(s.channels, 256),)](
                window, proj, t, s.channels, s.channels, BLOCK=256
            )

        return Case(
            "conv_window",
            s.delta_layers,
            [Variant("", run)],
            lambda: relative(window, proj[-3:]) if t >= 3 else 0.0,
        )

    def delta(self, t: int) -> list[Case]:
        s, dim, heads = self.s, self.s.linear_dim, self.s.value_heads
        qkv = self.floats(t, 2 * s.key_heads + heads, dim)
        qkv[:, : 2 * s.key_heads] /= qkv[:, : 2 * s.key_heads].norm(dim=-1, keepdim=True)
        qkv[:, : s.key_heads] *= dim**-0.5
        qkv = qkv.reshape(t, -1).to(torch.bfloat16)
        gates, z = self.floats(t, 2 * heads), self.rows(t, s.value_dim)
        decay_rate, dt_bias = -torch.rand(heads, device=self.device), self.floats(heads)
        weight = torch.rand(dim, device=self.device) + 0.5
        initial = self.floats(heads, dim, dim)
        state, chunks = initial.clone(), cdiv(t, 64)
        w, u = self.empty(chunks, heads, 64, dim), self.empty(chunks, heads, 64, dim)
        sums = self.empty(chunks, heads, 64, dtype=torch.float32)
        states, core = self.empty(chunks, heads, dim, dim), self.empty(t, s.value_dim)
        sizes = (t, 0, s.channels)

        def prepare(config: dict[str, Any]) -> None:
            delta_prepare.delta_prepare[(heads, chunks)](
                w,
                u,
                sums,
                qkv,
                gates,
                decay_rate,
                dt_bias,
                *sizes,
                2 * heads,
                s.key_heads,
                heads,
                DIM=dim,
                **config,
            )

        def scan(config: dict[str, Any]) -> None:
            delta_scan.delta_scan[(dim // config["BV"], heads)](
                state,
                states,
                u,
                w,
                sums,
                qkv,
                *sizes,
                s.key_heads,
                heads,
                DIM=dim,
                **config,
            )

        def output(config: dict[str, Any]) -> None:
            delta_output.delta_output[(heads, chunks)](
                core,
                states,
                u,
                sums,
                qkv,
                z,
                weight,
                *sizes,
                s.value_dim,
                s.key_heads,
                heads,
                1e-6,
                DIM=dim,
                **config,
            )

        def whole(precision: str) -> tuple[torch.Tensor, torch.Tensor]:
            state.copy_(initial)
            prepare({"PRECISION": precision, "num_warps": 4, "num_stages": 1})
            scan({"BV": 32, "num_warps": 4, "num_stages": 2})
            output({"num_warps": 8, "num_stages": 1})
            return ref.from_fragment_order(core), state.clone()

        def expected() -> tuple[torch.Tensor, torch.Tensor]:
            x = qkv.float().reshape(t, -1, dim)
            q, k, v = x.split([s.key_heads, s.key_heads, heads], dim=1)
            q, k = (y.repeat_interleave(heads // s.key_heads, 1) for y in (q, k))
            b, a = gates.chunk(2, dim=1)
            decay = decay_rate * torch.nn.functional.softplus(a + dt_bias)
            out, last = ref.gated_delta(q, k, v, decay, b.sigmoid(), initial)
            gate = torch.nn.functional.silu(z.float().reshape(t, heads, dim))
            return (ref.rms_norm(out, weight, 1e-6) * gate).reshape(t, -1), last

        def check_state() -> float:
            got, (_, last) = whole("tf32")[1], expected()
            for precision in ("tf32x3",):
                other = whole(precision)[1]
                print(f"    delta state with {precision}: {relative(other, last):.1e}")
            return relative(got, last)

        tile = 2.0 * chunks * heads * 64
        prepares = [
            {"PRECISION": p, "num_warps": warps, "num_stages": 1}
            for p in ("tf32", "tf32x3")
            for warps in (4, 8)
        ]
        scans = [
            {"BV": bv, "num_warps": warps, "num_stages": stages}
            for bv, warps, stages in (
                (32, 4, 2),
                (32, 4, 3),
                (32, 8, 2),
                (16, 4, 2),
                (16, 4, 3),
                (64, 4, 2),
                (64, 8, 2),
            )
        ]
        outputs = [{"num_warps": warps, "num_stages": 1} for warps in (8, 4)]
        if self.quick:
            prepares, scans = prepares[:1], scans[-1:]
        return [
            Case(
                "delta_prepare",
                s.delta_layers,
                [Variant(label(c), lambda c=c: prepare(c)) for c in prepares],  # type: ignore[misc]
                lambda: 0.0,
                flops=tile * (3 * 64 * dim + 4 * 64 * 64),
                bytes=2.0 * t * (s.channels + 2 * s.value_dim),
            ),
            Case(
                "delta_scan",
                s.delta_layers,
                [Variant(label(c), lambda c=c: scan(c)) for c in scans],  # type: ignore[misc]
                check_state,
                flops=tile * 3 * dim * dim,
                bytes=2.0 * chunks * heads * (dim * dim + 4 * 64 * dim),
            ),
            Case(
                "delta_output",
                s.delta_layers,
                [Variant(label(c), lambda c=c: output(c)) for c in outputs],  # type: ignore[misc]
                lambda: relative(whole("tf32")[0], expected()[0]),
                flops=tile * (dim * dim + 2 * 64 * dim),
                bytes=2.0 * chunks * heads * (dim * dim + 5 * 64 * dim),
            ),
        ]

    def attention(self, t: int) -> list[Case]:
        s, dim = self.s, self.s.head_dim
        stride = 2 * (s.heads + s.kv_heads) * dim
        proj = self.rows(t, stride)
        q_norm, k_norm = (torch.rand(dim, device=self.device) + 0.5 for _ in range(2))
        at = torch.arange(s.half_rotary, device=self.device)
        frequency = 1e7 ** (-at / s.half_rotary)
        pages = torch.randperm(cdiv(t, 64), device=self.device).int()
        kv = self.empty(cdiv(t, 64), 2, s.kv_heads, 64, dim)
        q, core = self.empty(t, s.heads, dim), self.empty(t, s.heads * dim)
        place = (t, 0, stride, kv.stride(0), s.heads, s.kv_heads)

        def append(config: dict[str, int]) -> None:
            attention_append.attention_append[(s.heads + 2 * s.kv_heads, cdiv(t, config["BT"]))](
                q,
                kv,
                proj,
                q_norm,
                k_norm,
                frequency,
                pages,
                *place,
                s.half_rotary,
                1e-6,
                dim**-0.5,
                DIM=dim,
                **config,
            )

        def attend(config: dict[str, int]) -> None:
            tokens = config["BM"] // (s.heads // s.kv_heads)
            attention.attention[(s.kv_heads, cdiv(t, tokens))](
                core, q, kv, proj, pages, *place, DIM=dim, **config
            )

        def expected() -> tuple[torch.Tensor, ...]:
            x = proj.float()
            gated = x[:, : 2 * s.heads * dim].reshape(t, s.heads, 2, dim)
            k, v = x[:, 2 * s.heads * dim :].reshape(t, 2, s.kv_heads, dim).unbind(1)
            position = torch.arange(t, device=self.device)
            query = ref.rms_norm(gated[:, :, 0], q_norm, 1e-6)
            query = ref.rotate(query, position, frequency) * dim**-0.5
            key = ref.rotate(ref.rms_norm(k, k_norm, 1e-6), position, frequency)
            return query, key, v, gated[:, :, 1]

        def check() -> float:
            query, key, value, gate = expected()
            first = max(0, t - 128)
            out = ref.attention(query[first:], key, value, first) * gate[first:].sigmoid()
            return relative(ref.from_fragment_order(core)[first:], out.reshape(t - first, -1))

        appends = [{"BT": 8, "num_warps": 4}, {"BT": 4, "num_warps": 4}, {"BT": 16, "num_warps": 8}]
        attends = [
            {"BM": bm, "BN": bn, "num_warps": warps, "num_stages": stages}
            for bm, bn, warps, stages in (
                (128, 64, 8, 2),
                (128, 32, 8, 3),
                (128, 32, 8, 4),
                (128, 64, 8, 1),
                (64, 64, 4, 1),
                (64, 32, 4, 2),
            )
        ]
        if self.quick:
            attends = [{"BM": 32, "BN": 64, "num_warps": 4, "num_stages": 1}]
        return [
            Case(
                "attention_append",
                s.attention_layers,
                [Variant(label(c), lambda c=c: append(c)) for c in appends],  # type: ignore[misc]
                lambda: relative(q, expected()[0]),
                bytes=2.0 * t * (2 * s.heads + 4 * s.kv_heads) * dim,
            ),
            Case(
                "attention",
                s.attention_layers,
                [Variant(label(c), lambda c=c: attend(c)) for c in attends],  # type: ignore[misc]
                check,
                flops=2.0 * t * t * s.heads * dim,
            ),
        ]

    def experts(self, t: int) -> list[Case]:
        s, picks = self.s, t * self.s.top_k
        gate_up = self.weight("experts gate_up", s.experts, 2 * s.inner, s.hidden, 4)
        down = self.weight("experts down", s.experts, s.hidden, s.inner, 4)
        x, logits = self.rows(t, s.hidden), self.floats(t, s.experts)
        ordered = ref.to_fragment_order(x)
        width, parts = max(16, 1 << (s.experts - 1).bit_length()), cdiv(t, 16)
        ids, ranks, order = (self.empty(picks, dtype=torch.int32) for _ in range(3))
        weights = self.empty(t, s.top_k, dtype=torch.float32)
        counts, places = (self.empty(parts, s.experts, dtype=torch.int32) for _ in range(2))
        act, partial = self.empty(picks, s.inner), self.empty(picks, s.hidden)
        hidden = self.floats(t, s.hidden)
        work: dict[int, torch.Tensor] = {}

        def top(config: dict[str, int]) -> None:
            route.top_experts[(parts,)](
                ids,
                weights,
                ranks,
                counts,
                logits,
                t,
                s.experts,
                s.top_k,
                BT=16,
                EXPERTS=width,
                TOP=1 << (s.top_k - 1).bit_length(),
                **config,
            )

        def plan(rows: int, warps: int = 8) -> None:
            if rows not in work:
                work[rows] = self.empty(1 + 3 * (picks // rows + s.experts), dtype=torch.int32)
            route.plan_experts[(1,)](
                places,
                work[rows],
                counts,
                parts,
                s.experts,
                rows,
                EXPERTS=width,
                BLOCKS=32,
                num_warps=warps,
            )

        def sort() -> None:
            route.sort_picks[(cdiv(picks, 256),)](
                order, ids, ranks, places, picks, s.experts, 16 * s.top_k, BLOCK=256
            )

        def first(config: dict[str, int]) -> None:
            bm, bn = config["BM"], config["BN"] // 2
            moe.expert_gate_up[(s.inner // bn * (picks // bm + s.experts),)](
                act,
                ordered,
                gate_up.codes,
                gate_up.scales,
                order,
                work[bm],
                s.inner,
                s.hidden,
                gate_up.tile_words,
                s.top_k,
                BITS=4,
                GROUP=128,
                **{**config, "BN": bn},
            )

        def second(config: dict[str, int]) -> None:
            bm, bn = config["BM"], config["BN"]
            moe.expert_down[(s.hidden // bn * (picks // bm + s.experts),)](
                partial,
                act,
                down.codes,
                down.scales,
                order,
                work[bm],
                s.hidden,
                s.inner,
                down.tile_words,
                BITS=4,
                GROUP=128,
                **config,
            )

        def combine(block: int) -> None:
            moe.combine_experts[(cdiv(s.hidden, block), t)](
                hidden, partial, weights, s.hidden, s.top_k, BLOCK=block
            )

        configs = self.tiles(SMALL + GEMM)
        # The first configuration is that of the table for so many rows.
        mean = picks / s.experts
        wanted = 16 if mean <= 24 else 64 if mean <= 96 else 128
        configs.sort(key=lambda c: c["BM"] != wanted)
        top({"num_warps": 4})
        for config in configs:
            plan(config["BM"])
        sort()

        def check_top() -> float:
            expected = ref.top_experts(logits, s.top_k)
            if not torch.equal(ids.reshape(t, -1), expected[0]):
                return float("inf")
            return relative(weights, expected[1])

        def check_sort() -> float:
            flat = ids.long()
            return 0.0 if torch.equal(order.long(), flat.sort(stable=True).indices) else 1.0

        def some() -> tuple[torch.Tensor, torch.Tensor]:
            """Tokens to check, and what their experts add up to."""
            at = self.sample(t)[-64:]
            chosen = ids.reshape(t, -1)[at]
            return at, ref.experts(x[at].float(), chosen, weights[at], gate_up.dense, down.dense)

        def check_act() -> float:
            at = self.sample(picks)[-64:]
            pick = order[at].long()
            token, expert = pick // s.top_k, ids[pick].long()
            both = torch.einsum("pk,pnk->pn", x[token].float(), gate_up.dense[expert])
            gate, up = both.chunk(2, dim=-1)
            return relative(ref.from_fragment_order(act)[at], torch.nn.functional.silu(gate) * up)

        def check_down() -> float:
            at, expected = some()
            got = (partial.reshape(t, s.top_k, -1)[at].float() * weights[at][..., None]).sum(1)
            return relative(got, expected)

        def check_combine() -> float:
            hidden.zero_()
            combine(512)
            at, expected = some()
            return relative(hidden[at], expected)

        weight_bytes = min(s.experts, picks)
        return [
            Case(
                "top_experts",
                s.layers,
                [
                    Variant(f"num_warps={n}", lambda n=n: top({"num_warps": n}))  # type: ignore[misc]
                    for n in (4, 8)
                ],
                check_top,
                bytes=4.0 * t * s.experts,
            ),
            Case(
                "plan_experts",
                s.layers,
                [
                    Variant(f"num_warps={n}", lambda n=n: plan(wanted, n))  # type: ignore[misc]
                    for n in (8, 4)
                ],
                lambda: 0.0,
            ),
            Case("sort_picks", s.layers, [Variant("", sort)], check_sort),
            Case(
                "experts gate_up int4",
                s.layers,
                [Variant(label(c), lambda c=c: first(c)) for c in configs],  # type: ignore[misc]
                check_act,
                flops=4.0 * picks * s.hidden * s.inner,
                bytes=gate_up.data.numel() / s.experts * weight_bytes
                + 2.0 * picks * (s.hidden + s.inner),
            ),
            Case(
                "experts down int4",
                s.layers,
                [Variant(label(c), lambda c=c: second(c)) for c in configs],  # type: ignore[misc]
                check_down,
                flops=2.0 * picks * s.hidden * s.inner,
                bytes=down.data.numel() / s.experts * weight_bytes
                + 2.0 * picks * (s.hidden + s.inner),
            ),
            Case(
                "combine_experts",
                s.layers,
                [
                    Variant(f"BLOCK={n}", lambda n=n: combine(n))  # type: ignore[misc]
                    for n in (1024, 512, 2048)
                ],
                check_combine,
                bytes=2.0 * picks * s.hidden + 8.0 * t * s.hidden,
            ),
        ]

    def groups(self, t: int) -> list[tuple[str, Callable[[], Case | list[Case]]]]:
        s, p = self.s, self.projection
        attention_in = 2 * (s.heads + s.kv_heads) * s.head_dim
        d, a, every = s.delta_layers, s.attention_layers, s.layers
        h, gates = s.hidden, 2 * s.value_heads
        return [
            ("rms_norm", lambda: self.rms_norm(t)),
            ("in_proj", lambda: p("in_proj qkv int4", t, s.channels, h, 4, d)),
            ("in_proj", lambda: p("in_proj z int4", t, s.value_dim, h, 4, d)),
            ("in_proj", lambda: p("in_proj b, a bf16", t, gates, h, 16, d, narrow=True)),
            ("unpack", lambda: self.unpack(t)),
            ("conv", lambda: self.convolution(t)),
            ("conv", lambda: self.conv_window(t)),
            ("delta", lambda: self.delta(t)),
            ("out_proj", lambda: p("out_proj int8", t, h, s.value_dim, 8, every, residual=True)),
            ("in_proj", lambda: p("q, k, v int4", t, attention_in, h, 4, a)),
            ("attention", lambda: self.attention(t)),
            ("router", lambda: p("router bf16", t, s.experts, h, 16, every, narrow=True)),
            ("router", lambda: p("shared gate bf16", t, 1, h, 16, every, narrow=True)),
            ("shared", lambda: self.shared_gate_up(t)),
            (
                "shared",
                lambda: p("shared down int8", t, h, s.shared, 8, every, residual=True, gated=True),
            ),
            ("experts", lambda: self.experts(t)),
        ]


def microseconds(run: Callable[[], None], device: str) -> float:
    """Median of graph replays: launching from Python costs more than most of these kernels."""
    run()
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6
    torch.cuda.synchronize()
    graph, launches = torch.cuda.CUDAGraph(), 5
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def measure(case: Case, t: int, device: str) -> Result:
    result = Result(case.name, t, case.count)
    for variant in case.variants:
        try:
            us = microseconds(variant.run, device)
        except Exception as error:
            result.tried[variant.label] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        result.tried[variant.label] = round(us, 1)
        if not result.us or us < result.us:
            result.us, result.config = us, variant.label
    if not result.us:
        result.failure = "no configuration ran"
        return result
    result.tflops = case.flops / result.us / 1e6
    result.gbs = case.bytes / result.us / 1e3
    result.error = case.check()
    return result


def show(result: Result) -> None:
    if result.failure:
        print(f"{result.name:30} {result.rows:6}  FAILED: {result.failure}", flush=True)
    else:
        rate = f"{result.tflops:8.1f} TF/s" if result.tflops else f"{'':13}"
        bytes_rate = f"{result.gbs:8.0f} GB/s" if result.gbs else f"{'':13}"
        print(
            f"{result.name:30} {result.rows:6} {result.us:10.1f} us {rate} {bytes_rate}"
            f"  error {result.error:.1e}  {result.config}",
            flush=True,
        )
    if len(result.tried) > 1 or result.failure:
        for config, us in result.tried.items():
            print(f"      {config:46} {us}", flush=True)


def ceilings() -> dict[str, float]:
    """Bytes a second of a plain copy and TFLOP/s of the library's plain product."""
    a = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    b = torch.empty_like(a)
    c = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(c)
    tflops = 2 * 8192**3 / microseconds(lambda: torch.mm(a, a, out=b), "cuda") / 1e6  # type: ignore[func-returns-value,arg-type]
    gbs = 2 * c.numel() / microseconds(lambda: to.copy_(c), "cuda") / 1e3  # type: ignore[func-returns-value,arg-type]
    return {"library bf16 TFLOP/s": round(tflops, 1), "copy GB/s": round(gbs)}


def summary(results: list[Result], rows: list[int]) -> dict[str, float]:
    """Of the whole model, by adding kernels up."""
    speed = {}
    for t in rows:
        here = [r for r in results if r.rows == t and r.count and not r.failure]
        total = sum(r.us * r.count for r in here)
        if not total:
            continue
        print(f"\n{t} rows: kernels of the model add up to {total / 1e3:.1f} ms")
        for r in sorted(here, key=lambda r: -r.us * r.count):
            share = r.us * r.count
            print(f"  {r.name:30} x{r.count:<3} {share / 1e3:8.2f} ms {100 * share / total:5.1f} %")
        speed[str(t)] = round(t / total * 1e6)
        print(f"  => {speed[str(t)]} tokens/s without launch gaps, embedding and head")
        missing = [r.name for r in results if r.rows == t and r.failure]
        if missing:
            print(f"  not counted, failed: {', '.join(missing)}")
    return speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="512,2048,8192")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    device = "cpu" if options.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --smoke with TRITON_INTERPRET=1 runs on the CPU")
        return 77
    import triton

    report: dict[str, Any] = {"triton": triton.__version__, "torch": torch.__version__}
    if device == "cuda":
        report |= {"device": torch.cuda.get_device_name(), **ceilings()}
    print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    rows = [65] if options.smoke else [int(x) for x in options.rows.split(",")]
    bench = Bench(SMOKE if options.smoke else Shape(), device, options.smoke)
    results: list[Result] = []
    for t in rows:
        torch.manual_seed(t)
        for group, make in bench.groups(t):
            if options.only not in group:
                continue
            try:
                cases = make()
            except Exception:
                traceback.print_exc()
                results.append(Result(group, t, failure="its inputs could not be made"))
                continue
            for case in cases if isinstance(cases, list) else [cases]:
                try:
                    result = measure(case, t, device)
                except Exception as error:
                    traceback.print_exc()
                    result = Result(case.name, t, failure=f"{type(error).__name__}: {error}"[:200])
                results.append(result)
                show(result)
    report["tokens per second"] = summary(results, rows)
    report["results"] = [asdict(result) for result in results]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [r.name for r in results if r.failure or not r.error < 2e-2]
    if wrong:
        print(f"\nfailed or wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
