"""AWQ with 4 bits, in the gemm layout of AutoAWQ.

A module [n, k] is `qweight` [k, n / 8] int32 (eight output features to a word, interleaved),
`qzeros` [k / group, n / 8] in the same order and `scales` [k / group, n]. Groups have zero points
of their own, which the engine's int4 has not: values are dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_moe.errors import InvalidArgument
from qwen_moe.formats.packed import (
    PER_WORD,
    check_shape,
    check_words,
    group_of,
    modules,
    required,
    unpack,
)
from qwen_moe.shards import Shards, StoredTensor
from qwen_moe.weights import Levels, QuantizedMatrix, Weight

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word holds each of its eight output features


@dataclass(frozen=True, slots=True)
class AwqMatrix(QuantizedMatrix):
    """A matrix of AWQ codes."""

    qweight: StoredTensor
    scales: StoredTensor
    qzeros: StoredTensor
    group: int
    format = "int4"
    symmetric = False

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[output features, input features]."""
        return (self.qweight.shape[1] * PER_WORD, self.qweight.shape[0])

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Codes, scales and zero points."""
        return (self.qweight, self.scales, self.qzeros)

    def levels(self, shards: Shards, begin: int, end: int) -> Levels:
        """Of output features [begin, end)."""
        every, words = slice(None), slice(begin // PER_WORD, -(-end // PER_WORD))
        skip = begin % PER_WORD
        rows = slice(skip, skip + end - begin)
        codes = unpack(shards.read(self.qweight, every, words), 1, _NIBBLES)[:, rows].T
        zeros = unpack(shards.read(self.qzeros, every, words), 1, _NIBBLES)[:, rows].T
        scales = shards.read(self.scales, every, slice(begin, end)).T
        return Levels(codes.contiguous(), scales.contiguous(), zeros.contiguous())


def assemble(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], source: str
) -> dict[str, Weight]:
    """Weights by FQN.

    Raises:
        InvalidArgument: Other bits than 4, or another layout than gemm.
        FormatError: A tensor is missing, or its shape or dtype does not fit.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    if bits != 4:
        raise InvalidArgument(
            f"{source}: bits of quantization_config is {bits!r}; of AWQ only 4 bits are read"
        )
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise InvalidArgument(
            f"{source}: version of quantization_config is {version!r}; of AWQ only the gemm layout "
            "is read"
        )
    group_size = settings.get("group_size", settings.get("q_group_size", 128))
    weights: dict[str, Weight] = dict(tensors)
    for module in modules(tensors, ".qweight"):
        names = ("qweight", "scales", "qzeros")
        qweight, scales, qzeros = (required(tensors, module, name) for name in names)
        for name in names:
            del weights[f"{module}.{name}"]
        check_words(qweight)
        check_words(qzeros)
        inputs, words = qweight.shape
        group = group_of(scales, inputs, 0, group_size)
        why = f"a weight of {[words * PER_WORD, inputs]}"
        check_shape(scales, (inputs // group, words * PER_WORD), why)
        check_shape(qzeros, (inputs // group, words), why)
        weights[f"{module}.weight"] = AwqMatrix(qweight, scales, qzeros, group)
    return weights
