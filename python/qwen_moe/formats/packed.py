"""Four-bit codes in int32 words, eight to a word: what GPTQ, AWQ and compressed-tensors share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from qwen_moe.errors import FormatError
from qwen_moe.shards import StoredTensor
from qwen_moe.weights import DTYPE_BYTES

PER_WORD = 8
IN_ORDER = tuple(range(PER_WORD))


def unpack(words: torch.Tensor, dim: int, order: Sequence[int] = IN_ORDER) -> torch.Tensor:
    """Codes of a 2-dimensional int32 tensor, 0 to 15: `dim` is eight times as long.

    Args:
        words: int32.
        dim: Along which eight codes share a word: 0 or 1.
        order: The nibble, lowest first, that holds each of the eight codes.
    """
    shifts = torch.tensor([4 * nibble for nibble in order], dtype=torch.int32)
    shape = (1, -1, 1) if dim == 0 else (1, 1, -1)
    codes = words.unsqueeze(dim + 1) >> shifts.view(shape) & 15
    return codes.flatten(dim, dim + 1)


def modules(tensors: Mapping[str, StoredTensor], suffix: str) -> list[str]:
    """FQNs of the modules that have a tensor of this name."""
    return [fqn.removesuffix(suffix) for fqn in tensors if fqn.endswith(suffix)]


def required(tensors: Mapping[str, StoredTensor], module: str, name: str) -> StoredTensor:
    """A tensor of a quantized module.

    Raises:
        FormatError: It is not there.
    """
    found = tensors.get(f"{module}.{name}")
    if found is None:
        there = next(t for fqn, t in tensors.items() if fqn.startswith(f"{module}."))
        full = f"{there.name.rpartition('.')[0]}.{name}"
        raise FormatError(f"{there.describe()}: {full}, which belongs to it, is missing")
    return found


def check_words(tensor: StoredTensor) -> None:
    """Refuse what is no matrix of int32.

    Raises:
        FormatError: It has another dtype or number of dimensions.
    """
    if tensor.dtype != "I32" or len(tensor.shape) != 2:
        raise FormatError(f"{tensor.describe()}: packed codes must be a matrix of I32")


def check_shape(tensor: StoredTensor, expected: tuple[int, ...], why: str) -> None:
    """Refuse another shape than `expected`.

    Raises:
        FormatError: The shape differs.
    """
    if tensor.shape != expected:
        raise FormatError(f"{tensor.describe()}: {why} needs {list(expected)}")


def group_of(scales: StoredTensor, inputs: int, dim: int, stated: object) -> int:
    """Input features per scale.

    Args:
        scales: [groups, outputs] or [outputs, groups].
        inputs: Input features of the weight.
        dim: The dimension of `scales` that counts groups.
        stated: The config's group_size, -1 for one group; None where each module may differ.

    Raises:
        FormatError: The groups do not divide the inputs, or the config says otherwise.
    """
    if len(scales.shape) != 2 or scales.dtype not in DTYPE_BYTES:
        raise FormatError(
            f"{scales.describe()}: scales must be a matrix of one of {', '.join(DTYPE_BYTES)}"
        )
    groups = scales.shape[dim]
    if groups == 0 or inputs % groups:
        raise FormatError(
            f"{scales.describe()}: {groups} groups do not divide {inputs} input features"
        )
    group = inputs // groups
    if stated is not None and group != (inputs if stated == -1 else stated):
        raise FormatError(
            f"{scales.describe()}: {groups} groups of {inputs} input features are {group} each; "
            f"group_size of the config is {stated}"
        )
    return group
