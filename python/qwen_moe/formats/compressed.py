"""compressed-tensors in the pack-quantized format with 4-bit integers (W4A16), by llm-compressor.

A module [n, k] is `weight_packed` [n, k / 8] int32 (eight input features to a word, as code + 8),
`weight_scale` [n, k / group], `weight_shape` (n, k), and when it is not symmetric
`weight_zero_point` [n / 8, k / group] int32 (eight output features to a word). Symmetric codes are
the engine's int4 and are kept with their scales; others are dequantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

_WEIGHTS = {"num_bits": 4, "type": "int"}  # the one kind of weights that is read


@dataclass(frozen=True, slots=True)
class PackedMatrix(QuantizedMatrix):
    """A matrix of pack-quantized codes."""

    packed: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None
    described: StoredTensor | None
    group: int
    format = "int4"

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """It has no zero points."""
        return self.zero_point is None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[output features, input features]."""
        return (self.packed.shape[0], self.packed.shape[1] * PER_WORD)

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Codes, scales, and what else there is."""
        more = (self.zero_point, self.described)
        return (self.packed, self.scale, *(tensor for tensor in more if tensor is not None))

    def levels(self, shards: Shards, begin: int, end: int) -> Levels:
        """Of output features [begin, end)."""
        if self.described is not None:
            shape = shards.read(self.described).tolist()
            if tuple(shape) != self.shape:
                raise FormatError(
                    f"{self.described.describe()}: says {shape}; the packed codes are "
                    f"{list(self.shape)}"
                )
        codes = unpack(shards.read(self.packed, slice(begin, end)), 1) - 8
        scales = shards.read(self.scale, slice(begin, end))
        if self.zero_point is None:
            return Levels(codes, scales)
        first = begin // PER_WORD
        words = shards.read(self.zero_point, slice(first, -(-end // PER_WORD)))
        skip = begin - first * PER_WORD
        zeros = unpack(words, 0)[skip : skip + end - begin] - 8
        return Levels(codes, scales, zeros)


def assemble(
    tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any], source: str
) -> dict[str, Weight]:
    """Weights by FQN.

    Raises:
        InvalidArgument: Another format than pack-quantized, other bits than 4, quantized
            activations, or act-order.
        FormatError: A tensor is missing, or its shape or dtype does not fit.
    """
    symmetric = _check(settings, source)
    weights: dict[str, Weight] = dict(tensors)
    for module in modules(tensors, ".weight_packed"):
        order = tensors.get(f"{module}.weight_g_idx")
        if order is not None:
            raise InvalidArgument(
                f"{order.describe()}: activation order (act-order) is not read; quantize without "
                "actorder"
            )
        packed = required(tensors, module, "weight_packed")
        scale = required(tensors, module, "weight_scale")
        if not symmetric:
            required(tensors, module, "weight_zero_point")
        zero_point = tensors.get(f"{module}.weight_zero_point")
        described = tensors.get(f"{module}.weight_shape")
        for suffix in ("packed", "scale", "zero_point", "shape"):
            weights.pop(f"{module}.weight_{suffix}", None)
        check_words(packed)
        outputs, inputs = packed.shape[0], packed.shape[1] * PER_WORD
        group = group_of(scale, inputs, 1, None)
        why = f"a weight of {[outputs, inputs]}"
        check_shape(scale, (outputs, inputs // group), why)
        if zero_point is not None:
            check_words(zero_point)
            check_shape(zero_point, (-(-outputs // PER_WORD), inputs // group), why)
        weights[f"{module}.weight"] = PackedMatrix(packed, scale, zero_point, described, group)
    return weights


def _check(settings: Mapping[str, Any], source: str) -> bool:
    """Refuse what is not W4A16; whether every group of modules is symmetric or may be."""
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(f"{source}: config_groups of quantization_config is {groups!r}")
    symmetric = False
    for name, group in groups.items():
        layout = group.get("format") or settings.get("format")
        if layout != "pack-quantized":
            raise InvalidArgument(
                f"{source}: format of quantization_config is {layout!r}; of compressed-tensors "
                "only pack-quantized is read"
            )
        scheme = group.get("weights") or {}
        for field, only in _WEIGHTS.items():
            if scheme.get(field) != only:
                raise InvalidArgument(
                    f"{source}: weights.{field} of {name} in quantization_config is "
                    f"{scheme.get(field)!r}; of compressed-tensors only {only!r} is read"
                )
        if group.get("input_activations"):
            raise InvalidArgument(
                f"{source}: {name} of quantization_config has input_activations; only quantized "
                "weights with 16-bit activations (W4A16) are read"
            )
        if scheme.get("actorder") in ("group", "dynamic"):
            raise InvalidArgument(
                f"{source}: weights.actorder of {name} in quantization_config is "
                f"{scheme['actorder']!r}; activation order (act-order) is not read"
            )
        symmetric |= bool(scheme.get("symmetric", True))
    return symmetric
