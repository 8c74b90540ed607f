"""config.json of a checkpoint -> the model's dimensions, or an error that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe._core import ModelConfig
from qwen_moe.errors import FormatError, InvalidArgument

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text")
ARCHITECTURES = ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration")

_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "max_position_embeddings",
)

# Settings that change what the model computes: the one value that this engine runs, which is also
# what a config means that leaves the setting out.
_ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "attn_output_gate": True,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
}


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FormatError: The file is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the language model."""
    nested = raw.get("text_config")
    return nested if isinstance(nested, Mapping) else raw


def quantization_config(raw: Mapping[str, Any]) -> Any:  # noqa: ANN401 - checked by its reader
    """How the checkpoint is quantized already, as config.json says; None when it is not."""
    return raw.get("quantization_config") or text_config(raw).get("quantization_config")


def read_config(path: Path) -> ModelConfig:
    """Read the model's dimensions from a config.json.

    Raises:
        FormatError: A field is missing or of the wrong type.
        InvalidArgument: Another family of models, or a setting that this engine cannot run.
    """
    return parse_config(load_json(path), str(path))


def parse_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """Like `read_config`, of a parsed config.json; `source` names it in errors."""
    _check_family(raw, source)
    text = text_config(raw)
    _check_settings(text, source)
    fields = {name: _integer(text, name, source) for name in _INTEGERS}
    theta, rotary = _rope(text, source)
    tied = raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
    if not isinstance(tied, bool):
        raise FormatError(f"{source}: tie_word_embeddings must be true or false, got {tied!r}")
    try:
        return ModelConfig(
            **fields,
            layer_types=_layer_types(text, fields["num_hidden_layers"], source),
            rope_theta=theta,
            partial_rotary_factor=rotary,
            rms_norm_eps=_number(text, "rms_norm_eps", source, 1e-6),
            tie_word_embeddings=tied,
        )
    except (InvalidArgument, TypeError) as error:
        raise InvalidArgument(f"{source}: {error}") from error


def _check_family(raw: Mapping[str, Any], source: str) -> None:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise InvalidArgument(
            f"{source}: model_type is {model_type!r}; this engine runs {' and '.join(MODEL_TYPES)}"
        )
    architectures = raw.get("architectures") or []
    if architectures and not any(name in ARCHITECTURES for name in architectures):
        raise InvalidArgument(
            f"{source}: architectures is {architectures!r}; this engine runs "
            f"{' and '.join(ARCHITECTURES)}"
        )


def _check_settings(text: Mapping[str, Any], source: str) -> None:
    for name, only in _ONLY.items():
        value = text.get(name, only)
        if value is not None and value != only:
            raise InvalidArgument(
                f"{source}: {name} is {value!r}; this engine runs only {json.dumps(only)}"
            )


def _integer(text: Mapping[str, Any], name: str, source: str) -> int:
    if name not in text:
        raise FormatError(f"{source}: {name} is missing")
    value = text[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"{source}: {name} must be an integer, got {value!r}")
    return value


def _number(text: Mapping[str, Any], name: str, source: str, default: float | None = None) -> float:
    value = text.get(name, default)
    if value is None:
        raise FormatError(f"{source}: {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{source}: {name} must be a number, got {value!r}")
    return float(value)


def _rope(text: Mapping[str, Any], source: str) -> tuple[float, float]:
    """(rope_theta, partial_rotary_factor), from rope_parameters or from the older fields."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise FormatError(f"{source}: rope_parameters must be an object, got {rope!r}")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InvalidArgument(
            f"{source}: rope_type is {rope_type!r}; this engine runs only default"
        )
    merged = {**text, **rope}
    return (
        _number(merged, "rope_theta", source),
        _number(merged, "partial_rotary_factor", source, 0.25),
    )


def _layer_types(text: Mapping[str, Any], layers: int, source: str) -> list[str]:
    types = text.get("layer_types")
    if types is None:
        every = _integer({"full_attention_interval": 4, **text}, "full_attention_interval", source)
        if every < 1:
            raise FormatError(f"{source}: full_attention_interval must be positive, got {every}")
        return [
            "linear_attention" if (layer + 1) % every else "full_attention"
            for layer in range(layers)
        ]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise FormatError(f"{source}: layer_types must be a list of names, got {types!r}")
    if len(types) != layers:
        raise FormatError(
            f"{source}: layer_types names {len(types)} layers, num_hidden_layers is {layers}"
        )
    return types
