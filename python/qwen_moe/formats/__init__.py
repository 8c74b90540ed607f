"""Checkpoints that are quantized already, one module for each format.

A format turns the tensors of the files into weights: `assemble(tensors, settings, source)` takes
the stored tensors by FQN and `quantization_config`, and gives back a `Weight` for each FQN, with
the tensors that no quantized weight is made of as they are. Nothing is read but headers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.formats import awq, compressed, fp8, gptq
from qwen_moe.shards import StoredTensor
from qwen_moe.weights import Weight

Settings = Mapping[str, Any]
Assemble = Callable[[Mapping[str, StoredTensor], Settings, str], dict[str, Weight]]

METHODS: dict[str, Assemble] = {
    "fp8": fp8.assemble,
    "gptq": gptq.assemble,
    "awq": awq.assemble,
    "compressed-tensors": compressed.assemble,
}


def quant_method(settings: Settings | None, source: str) -> str | None:
    """The method that `quantization_config` names; None when the checkpoint is not quantized.

    Args:
        settings: quantization_config of config.json, or None.
        source: The config file, for errors.

    Raises:
        FormatError: It is no object.
        InvalidArgument: The method is one that this engine does not read.
    """
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise FormatError(f"{source}: quantization_config must be an object, got {settings!r}")
    method = settings.get("quant_method")
    if method not in METHODS:
        raise InvalidArgument(
            f"{source}: quant_method of quantization_config is {method!r}; this engine reads "
            f"{', '.join(METHODS)} and checkpoints that are not quantized"
        )
    return str(method)
