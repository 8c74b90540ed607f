"""Token mixers: convolution and gated delta rule, or attention."""

from __future__ import annotations

from typing import Any

import torch

import prefill_reference as ref
from qwen_moe.kernels import (
    attention,
    attention_append,
    conv,
    delta_output,
    delta_prepare,
    delta_scan,
)

from .inputs import Case, Inputs, Variant, cdiv, label, relative


class Mixers(Inputs):
    """Convolution and gated delta rule, or attention."""

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
            {"BT": bt, "num_warps": warps} for bt, warps in ((64, 8), (32, 4), (16, 4), (64, 4))
        ]
        return Case(
            "conv_silu_norm",
            s.delta_layers,
            [Variant(label(c), lambda c=c: run(c)) for c in configs],
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
                (32, 4, 3),
                (32, 4, 2),
                (32, 8, 2),
                (16, 4, 2),
                (16, 4, 3),
                (64, 4, 2),
                (64, 8, 2),
            )
        ]
        outputs = [{"num_warps": warps, "num_stages": 1} for warps in (4, 8)]
        if self.quick:
            prepares, scans = prepares[:1], scans[-1:]
        return [
            Case(
                "delta_prepare",
                s.delta_layers,
                [Variant(label(c), lambda c=c: prepare(c)) for c in prepares],
                lambda: 0.0,
                flops=tile * (3 * 64 * dim + 4 * 64 * 64),
                bytes=2.0 * t * (s.channels + 2 * s.value_dim),
            ),
            Case(
                "delta_scan",
                s.delta_layers,
                [Variant(label(c), lambda c=c: scan(c)) for c in scans],
                check_state,
                flops=tile * 3 * dim * dim,
                bytes=2.0 * chunks * heads * (dim * dim + 4 * 64 * dim),
            ),
            Case(
                "delta_output",
                s.delta_layers,
                [Variant(label(c), lambda c=c: output(c)) for c in outputs],
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

        appends = [{"BT": 4, "num_warps": 4}, {"BT": 8, "num_warps": 4}, {"BT": 16, "num_warps": 8}]
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
                [Variant(label(c), lambda c=c: append(c)) for c in appends],
                lambda: relative(q, expected()[0]),
                bytes=2.0 * t * (2 * s.heads + 4 * s.kv_heads) * dim,
            ),
            Case(
                "attention",
                s.attention_layers,
                [Variant(label(c), lambda c=c: attend(c)) for c in attends],
                check,
                flops=2.0 * t * t * s.heads * dim,
            ),
        ]
