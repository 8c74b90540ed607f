"""FP8 with block scales, as the official FP8 checkpoints have it.

A matrix `X.weight` of float8_e4m3fn [n, k] comes with `X.weight_scale_inv` [n / 128, k / 128],
rounded up: what the weights of a block are multiplied with. Fused experts are `gate_up_proj` with
`gate_up_proj_scale_inv`, one dimension more each. Modules in `modules_to_not_convert` have plain
weights. The engine has no FP8 format, so values are multiplied out in float32; as bfloat16 they
round once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.shards import Shards, StoredTensor
from qwen_moe.weights import DTYPE_BYTES, Composite, Weight

_DTYPE = "F8_E4M3"


@dataclass(frozen=True, slots=True)
class Fp8Matrix(Composite):
    """A matrix, or a stack of them, in e4m3 with a scale for every block.

    Attributes:
        weight: [..., n, k] F8_E4M3.
        scale: [..., n / block[0], k / block[1]], rounded up.
        block: Output and input features that share a scale.
    """

    weight: StoredTensor
    scale: StoredTensor
    block: tuple[int, int]
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the weight."""
        return self.weight.shape

    def describe(self) -> str:
        """Name, shape, dtype and file, for errors."""
        return self.weight.describe()

    def tensors(self) -> tuple[StoredTensor, ...]:
        """The weight and its scales."""
        return (self.weight, self.scale)

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of entries [begin, end) of the leading dimension: float32."""
        values = shards.read(self.weight, slice(begin, end)).float()
        rows, columns = self.block
        if len(self.shape) == 2:
            first = begin // rows
            scale = shards.read(self.scale, slice(first, -(-end // rows)))
            skip = begin - first * rows
        else:
            scale, skip = shards.read(self.scale, slice(begin, end)), 0
        if not scale.isfinite().all():
            raise FormatError(f"{self.scale.describe()}: a scale is not finite")
        wide = scale.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        values *= wide[..., skip : skip + values.shape[-2], : values.shape[-1]]
        return values


def assemble(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], source: str
) -> dict[str, Weight]:
    """Weights by FQN.

    Raises:
        InvalidArgument: The config names another kind of FP8.
        FormatError: A scale is missing, or its shape or dtype does not fit its weight.
    """
    block = _block(settings, source)
    weights: dict[str, Weight] = {}
    for fqn, tensor in tensors.items():
        if tensor.dtype == _DTYPE:
            weights[fqn] = _matrix(tensor, tensors.get(f"{fqn}_scale_inv"), block)
        elif not _is_scale(fqn, tensors):
            weights[fqn] = tensor
    return weights


def _block(settings: Mapping[str, Any], source: str) -> tuple[int, int]:
    kind = settings.get("fmt", "e4m3")
    if kind != "e4m3":
        raise InvalidArgument(
            f"{source}: fmt of quantization_config is {kind!r}; only e4m3 is read"
        )
    block = settings.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(size, int) and size > 0 for size in block)
    ):
        raise InvalidArgument(
            f"{source}: weight_block_size of quantization_config is {block!r}; only block scales "
            "are read, such as [128, 128]"
        )
    return block[0], block[1]


def _is_scale(fqn: str, tensors: Mapping[str, StoredTensor]) -> bool:
    owner = tensors.get(fqn.removesuffix("_scale_inv"))
    return fqn.endswith("_scale_inv") and owner is not None and owner.dtype == _DTYPE


def _matrix(weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int]) -> Fp8Matrix:
    if scale is None:
        raise FormatError(
            f"{weight.describe()}: its scales {weight.name}_scale_inv are missing; without them "
            "the weights mean nothing"
        )
    if len(weight.shape) < 2:
        raise FormatError(f"{weight.describe()}: only matrices can be FP8")
    rows, columns = (-(-size // each) for size, each in zip(weight.shape[-2:], block, strict=True))
    expected = (*weight.shape[:-2], rows, columns)
    if scale.shape != expected:
        raise FormatError(
            f"{scale.describe()}: blocks of {list(block)} of a weight of {list(weight.shape)} need "
            f"scales of {list(expected)}"
        )
    if scale.dtype not in DTYPE_BYTES:
        raise FormatError(f"{scale.describe()}: scales must be one of {', '.join(DTYPE_BYTES)}")
    return Fp8Matrix(weight, scale, block)
