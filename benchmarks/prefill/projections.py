"""Norms and projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import prefill_reference as ref
from qwen_moe.kernels import dense, norm

from .inputs import Case, Inputs, Variant, cdiv, label, relative

# Configurations of products: rows, outputs, warps, stages, inputs at a time.
GEMM = [
    (256, 128, 8, 3, 128),
    (256, 128, 8, 4, 64),
    (128, 128, 8, 3, 128),
    (128, 128, 8, 4, 64),
    (128, 128, 8, 3, 64),
    (128, 128, 4, 4, 64),
    (128, 256, 8, 3, 128),
    (256, 64, 4, 3, 128),
    (256, 64, 4, 4, 64),
    (128, 64, 4, 3, 128),
    (128, 64, 4, 4, 64),
    (64, 128, 4, 3, 128),
    (64, 128, 4, 4, 64),
    (64, 64, 4, 4, 128),
    (32, 64, 4, 4, 128),
]
GEMM_BF16 = [
    (128, 128, 8, 3, 64),
    (128, 128, 8, 4, 64),
    (128, 256, 8, 3, 64),
    (256, 128, 8, 3, 64),
    (64, 128, 4, 4, 64),
]
NARROW = [(64, 64, 4, 3, 64), (32, 64, 4, 4, 128), (32, 64, 4, 4, 64), (16, 64, 4, 4, 128)]
ALONE = (0, 0, 0, 0) * 2  # no second and no third matrix


class Projections(Inputs):
    """Norms and projections."""

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
            [Variant(f"num_warps={warps}", run(warps)) for warps in (8, 4)],
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

        def run(config: dict[str, Any]) -> None:
            dense.project[(cdiv(n, config["BN"]) * cdiv(t, config["BM"]),)](
                out,
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
                *ALONE,
                BITS=bits,
                GROUP=group,
                RESIDUAL=residual,
                GATED=gated,
                **config,
            )

        configs = self.tiles(NARROW if narrow else GEMM_BF16 if bits == 16 else GEMM)
        if narrow:
            configs.sort(key=lambda c: c["BM"] != (32 if t <= 512 else 64))
        else:
            self.put_first(configs, t, n, bits)

        def check() -> float:
            at = self.sample(t)
            expected = x[at].float() @ w.dense[0].T
            if gated:
                expected *= gate[at].sigmoid()[:, None]
            return relative(out[at], expected)

        return Case(
            name,
            count,
            [Variant(label(config), lambda config=config: run(config)) for config in configs],
            check,
            flops=2.0 * t * n * k,
            bytes=w.data.numel() + 2.0 * t * k + (8 if residual else out.element_size()) * t * n,
            reset=out.zero_,
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

        configs = self.tiles(GEMM)
        self.put_first(configs, t, 2 * n, 8)

        def check() -> float:
            at = self.sample(t)
            gate, up = x[at].float() @ w.dense[0].T, x[at].float() @ w.dense[1].T
            return relative(ref.from_fragment_order(out)[at], torch.nn.functional.silu(gate) * up)

        return Case(
            "shared gate_up int8",
            s.layers,
            [Variant(label(c), lambda c=c: run(c)) for c in configs],
            check,
            flops=4.0 * t * n * k,
            bytes=w.data.numel() + 2.0 * t * (k + n),
        )
