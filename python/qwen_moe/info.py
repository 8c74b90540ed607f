"""`qwen-moe info`: sizes of a model, and what of it fits on this machine."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from qwen_moe import _core
from qwen_moe.bundle import MANIFEST
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.engine import DEFAULT_CONTEXT, EMBEDDED, KV_DTYPES
from qwen_moe.plan import plan

RECIPES = ("none", "int8", "int4", "int4-all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=EMBEDDED,
        metavar="PATH",
        help="directory with a config.json, or a GGUF file; default: the one in the package",
    )
    parser.add_argument(
        "--group", type=int, metavar="N", help="input features per scale: 32 (CPU), 64 or 128"
    )


def run(args: argparse.Namespace) -> None:
    """Print what there is to know without loading anything."""
    checkpoint = Checkpoint(args.path, "dummy")
    packed = (args.path / MANIFEST).is_file()
    if checkpoint.quantization is not None or packed:  # only its tensors say which stay as they are
        checkpoint = Checkpoint(args.path)
    config = checkpoint.config
    recipes = RECIPES if checkpoint.bundle is None else (checkpoint.recipe(),)
    weights = {
        recipe: weight_bytes(checkpoint, recipe, args.group if packed or recipe != "none" else None)
        for recipe in recipes
    }
    print(f"{args.path}\n")
    for name, value in _facts(config):
        print(f"{name:34} {value}")
    total, active = parameters(config, checkpoint.dtype)
    print(f"{'parameters':34} {total:,} ({active:,} active for each token)\n")

    available = available_memory()
    context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    for kv_dtype in KV_DTYPES:
        fixed, per_token = _core.session_bytes(config, kv_dtype)
        print(
            f"a session with {kv_dtype} KV: {size(fixed)}, and {size(per_token)} for each token; "
            f"{size(fixed + per_token * context)} at {context} tokens"
        )
    fixed, per_token = _core.session_bytes(config, KV_DTYPES[0])
    session = fixed + per_token * context
    print(f"memory available here: {size(available)}\n")
    print(f"{'quantize':10} {'weights':>10}  fits here, with {KV_DTYPES[0]} KV")
    for recipe, count in weights.items():
        sessions = (available - count) // session
        fits = f"{sessions:,} sessions of {context} tokens" if sessions > 0 else "no"
        name = (checkpoint.quantization or checkpoint.dtype) if recipe == "none" else recipe
        print(f"{name:10} {size(count):>10}  {fits}")


def parameters(config: _core.ModelConfig, dtype: str) -> tuple[int, int]:
    """(all parameters, those that one token passes)."""
    total = active = 0
    for slot in _core.plan(config, "none", dtype):
        count = math.prod(slot.shape)
        total += count
        routed = ".experts." in slot.fqn
        active += count * config.num_experts_per_tok // config.num_experts if routed else count
    return total, active


def weight_bytes(checkpoint: Checkpoint, recipe: str, group: int | None = None) -> int:
    """Resident bytes of the weights, on a CPU."""
    return sum(slot.bytes for slot in plan(checkpoint, recipe, ("cpu",), group).slots)


def available_memory() -> int:
    """Bytes that programs may still take, by the kernel's estimate."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _facts(config: _core.ModelConfig) -> list[tuple[str, object]]:
    full = config.layer_types.count("full_attention")
    return [
        ("layers", f"{config.num_hidden_layers} ({full} with full attention)"),
        ("hidden_size", config.hidden_size),
        ("vocab_size", config.vocab_size),
        ("max_position_embeddings", config.max_position_embeddings),
        (
            "attention heads (query, KV, size)",
            _heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        ),
        (
            "linear heads (key, value, size)",
            _heads(
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
            ),
        ),
        (
            "experts (of each layer, per token)",
            f"{config.num_experts}, {config.num_experts_per_tok} and a shared one",
        ),
        (
            "expert size (routed, shared)",
            f"{config.moe_intermediate_size}, {config.shared_expert_intermediate_size}",
        ),
        ("tied embeddings", "yes" if config.tie_word_embeddings else "no"),
        ("config hash", config.hash),
    ]


def _heads(first: int, second: int, each: int) -> str:
    return f"{first}, {second}, {each}"
