"""Shapes of the model, and what a timed kernel is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import prefill_reference as ref
from qwen_moe.kernels import specs


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


@dataclass
class Variant:
    label: str
    run: Callable[[], None]


@dataclass
class Case:
    """One kernel.

    Attributes:
        count: Launches of it in the whole model.
        check: Relative error of what the last run left.
        reset: Called before the run that is checked, where a kernel adds.
    """

    name: str
    count: int
    variants: list[Variant]
    check: Callable[[], float]
    flops: float = 0
    bytes: float = 0
    reset: Callable[[], object] = lambda: None


def cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.float(), expected.float()
    if not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def label(options: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items())


class Inputs:
    """Of kernels, on one device."""

    def __init__(self, shape: Shape, device: str, quick: bool) -> None:
        self.s, self.device, self.quick = shape, device, quick
        self.weights: dict[str, ref.Packed] = {}

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

    @staticmethod
    def config(tile: specs.Tile) -> dict[str, Any]:
        """Of a tile of the table, for weights in groups of 128."""
        return {
            "BM": tile.rows,
            "BN": tile.outputs,
            "STEP": tile.step,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def put_first(self, configs: list[dict[str, Any]], t: int, n: int, bits: int) -> None:
        """The configuration that the core takes for so many rows and outputs comes first."""
        if self.quick:
            return
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        for tile in specs.TILES:
            if tile.rows > 16 and tile.rows >= 2 * t:
                continue
            chosen = specs.dense_tile(tile, bits)
            if cdiv(t, tile.rows) * cdiv(n, tile.outputs) >= sms * 3 // 4:
                break
        first = self.config(chosen)
        configs[:] = [first, *(config for config in configs if config != first)]

    def tiles(self, options: list[tuple[int, int, int, int, int]]) -> list[dict[str, Any]]:
        if self.quick:
            return [{"BM": 16, "BN": 128, "STEP": 64, "num_warps": 4, "num_stages": 2}]
        return [
            {"BM": bm, "BN": bn, "STEP": step, "num_warps": warps, "num_stages": stages}
            for bm, bn, warps, stages, step in options
        ]
