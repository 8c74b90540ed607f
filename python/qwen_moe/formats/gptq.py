"""GPTQ with 4 bits, as GPTQModel and AutoGPTQ write it.

A module [n, k] is `qweight` [k / 8, n] int32 (eight input features to a word), `scales`
[k / group, n], `qzeros` [k / group, n / 8] int32 (eight output features to a word) and `g_idx` [k].
Zero points lie there minus one, or as they are in gptq_v2. With `sym` every zero point is 8, which
is the engine's int4: codes and scales are kept. Others are dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qwen_moe.errors import FormatError, InvalidArgument
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

_ZERO_SHIFT = {"gptq": 1, "gptq_v2": 0}  # what is added to a stored zero point


@dataclass(frozen=True, slots=True)
class GptqMatrix(QuantizedMatrix):
    """A matrix of GPTQ codes; `zero_shift` is added to its stored zero points."""

    qweight: StoredTensor
    scales: StoredTensor
    qzeros: StoredTensor
    g_idx: StoredTensor | None
    group: int
    symmetric: bool
    zero_shift: int
    format = "int4"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[output features, input features]."""
        return (self.qweight.shape[1], self.qweight.shape[0] * PER_WORD)

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, zero points and the order of the groups."""
        found = (self.qweight, self.scales, self.qzeros)
        return found if self.g_idx is None else (*found, self.g_idx)

    def levels(self, shards: Shards, begin: int, end: int) -> Levels:
        """Of output features [begin, end)."""
        self._check_order(shards)
        every, columns = slice(None), slice(begin, end)
        codes = unpack(shards.read(self.qweight, every, columns), 0).T
        scales = shards.read(self.scales, every, columns).T
        first = begin // PER_WORD
        words = shards.read(self.qzeros, every, slice(first, -(-end // PER_WORD)))
        skip = begin - first * PER_WORD
        # A stored 15 stands for the zero point 16.
        zeros = (unpack(words, 1) + self.zero_shift)[:, skip : skip + end - begin].T
        if not self.symmetric:
            return Levels(codes.contiguous(), scales.contiguous(), zeros.contiguous())
        if (zeros != 8).any():
            odd = int(zeros[zeros != 8][0])
            raise FormatError(
                f"{self.qzeros.describe()}: a zero point is {odd}; with sym in "
                "quantization_config it must be 8, and without it the weights are dequantized"
            )
        return Levels((codes - 8).contiguous(), scales.contiguous())

    def _check_order(self, shards: Shards) -> None:
        if self.g_idx is None:
            return
        order = shards.read(self.g_idx)
        if not torch.equal(order.long(), torch.arange(len(order)) // self.group):
            raise FormatError(
                f"{self.g_idx.describe()}: input features are not in the order of their groups "
                "(act-order, desc_act), which this engine does not read; quantize with "
                "desc_act=False"
            )


def assemble(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], source: str
) -> dict[str, Weight]:
    """Weights by FQN.

    Raises:
        InvalidArgument: Other bits than 4, act-order, or a layout for one kind of kernel.
        FormatError: A tensor is missing, or its shape or dtype does not fit.
    """
    bits = settings.get("bits")
    if bits != 4:
        raise InvalidArgument(
            f"{source}: bits of quantization_config is {bits!r}; of GPTQ only 4 bits are read"
        )
    if settings.get("desc_act", False):
        raise InvalidArgument(
            f"{source}: desc_act of quantization_config is true; activation order (act-order) is "
            "not read, so quantize with desc_act=False"
        )
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if layout not in _ZERO_SHIFT:
        raise InvalidArgument(
            f"{source}: checkpoint_format of quantization_config is {layout!r}; this engine reads "
            f"{' and '.join(_ZERO_SHIFT)}"
        )
    # With `dynamic`, modules may have groups of their own.
    group_size = None if settings.get("dynamic") else settings.get("group_size", 128)
    symmetric = bool(settings.get("sym", True))
    weights: dict[str, Weight] = dict(tensors)
    for module in modules(tensors, ".qweight"):
        parts = [required(tensors, module, name) for name in ("qweight", "scales", "qzeros")]
        qweight, scales, qzeros = parts
        g_idx = weights.pop(f"{module}.g_idx", None)
        for part in parts:
            del weights[f"{module}.{part.name.rpartition('.')[2]}"]
        check_words(qweight)
        check_words(qzeros)
        outputs, inputs = qweight.shape[1], qweight.shape[0] * PER_WORD
        group = group_of(scales, inputs, 0, group_size)
        groups = inputs // group
        check_shape(scales, (groups, outputs), f"a weight of {[outputs, inputs]}")
        check_shape(qzeros, (groups, -(-outputs // PER_WORD)), f"a weight of {[outputs, inputs]}")
        if g_idx is not None:
            check_shape(tensors[f"{module}.g_idx"], (inputs,), f"a weight of {[outputs, inputs]}")
        weights[f"{module}.weight"] = GptqMatrix(
            qweight,
            scales,
            qzeros,
            tensors.get(f"{module}.g_idx"),
            group,
            symmetric,
            _ZERO_SHIFT[layout],
        )
    return weights
