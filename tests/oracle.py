"""Reference models from transformers, and the few steps from one of them to the engine.

`random_model` makes a small Qwen3_5MoeForCausalLM in fp32 whose weights the checkpoint dtype holds
exactly, so that a saved and reloaded copy is the same model. Its distribution is peaked and depends
on the whole context, so that greedy text neither loops nor hangs on the last bit.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)

from qwen_moe import _core

transformers.utils.logging.disable_progress_bar()

# What production runs: head_dim 256, linear heads 128 x 128, conv 4. The rest is small.
SMALL = {
    "vocab_size": 384,
    "hidden_size": 128,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 1024,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.25,
}


def text_config(**changes) -> Qwen3_5MoeTextConfig:
    fields = SMALL | changes
    rotary = int(fields["head_dim"] * fields["partial_rotary_factor"]) // 2
    rope = {
        "rope_type": "default",
        "rope_theta": fields.pop("rope_theta"),
        "partial_rotary_factor": fields.pop("partial_rotary_factor"),
        "mrope_interleaved": True,
        "mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3],
    }
    config = Qwen3_5MoeTextConfig(
        num_hidden_layers=len(fields["layer_types"]), rope_parameters=rope, **fields
    )
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


@torch.no_grad()
def random_model(
    config: Qwen3_5MoeTextConfig, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Qwen3_5MoeForCausalLM:
    model = Qwen3_5MoeForCausalLM(config).eval()
    random = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(like.shape, generator=random)

    def uniform(like: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=random)

    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            value = uniform(weight, -4.0, 1.0)  # from forgetting at once to hardly ever
        elif name.endswith("dt_bias"):
            value = uniform(weight, -3.0, 1.0)
        elif name.endswith("linear_attn.norm.weight"):
            value = normal(weight, 0.2, mean=1.0)
        elif "norm" in name:
            value = normal(weight, 0.2)
        elif name.endswith("conv1d.weight"):
            value = normal(weight, 0.7)
        elif "embed_tokens" in name or "lm_head" in name:
            value = normal(weight, 3.0 if config.tie_word_embeddings else 4.0) / 10
        else:
            value = normal(weight, 1.4 * weight.shape[-1] ** -0.5)
        weight.copy_(value.to(dtype).float())
    return model


def prompt(length: int, *, seed: int = 0, vocab: int = SMALL["vocab_size"]) -> list[int]:
    random = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocab, (length,), generator=random).tolist()


@dataclass(frozen=True)
class Reference:
    """A prompt, its greedy continuation, and the logits after each of their tokens."""

    prompt: list[int]
    continuation: list[int]
    logits: np.ndarray  # [prompt + continuation, vocab] float32
    margin: float  # the smallest lead of the likeliest token, over the largest |logit|
    router_margin: float  # the smallest gap of router logits at the edge of the top k


@torch.no_grad()
def reference(model: Qwen3_5MoeForCausalLM, ids: list[int], *, steps: int) -> Reference:
    """Greedy decoding through the cache, then every logit in one pass."""
    gaps: list[float] = []

    def watch(module, _inputs, outputs) -> None:
        if module.top_k < module.num_experts:
            edge = outputs[0].sort(-1, descending=True).values[:, module.top_k - 1 :][:, :2]
            gaps.append(float((edge[:, 0] - edge[:, 1]).min()))

    hooks = [layer.mlp.gate.register_forward_hook(watch) for layer in model.model.layers]
    cache = DynamicCache(config=model.config)
    step = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    continuation: list[int] = []
    margin = float("inf")
    for _ in range(steps):
        best = step.topk(2)
        margin = min(margin, float((best.values[0] - best.values[1]) / step.abs().max()))
        continuation.append(int(best.indices[0]))
        step = model(
            torch.tensor([continuation[-1:]]), past_key_values=cache, use_cache=True
        ).logits[0, -1]
    logits = model(torch.tensor([ids + continuation]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    edge = min(gaps, default=float("inf"))
    return Reference(list(ids), continuation, logits.numpy(), margin, edge)


def find_reference(
    config: Qwen3_5MoeTextConfig, *, dtype: torch.dtype, length: int, steps: int
) -> tuple[Qwen3_5MoeForCausalLM, Reference]:
    """The first seed where no choice of token or expert hangs on rounding."""
    for seed in range(50):
        model = random_model(config, seed=seed, dtype=dtype)
        found = reference(model, prompt(length, seed=seed, vocab=config.vocab_size), steps=steps)
        if found.margin > 1e-3 and found.router_margin > 2e-4:
            assert len(set(found.continuation)) > steps // 4, (
                "greedy text that repeats tests little"
            )
            return model, found
    raise AssertionError("no seed gives a decided model")


def relative_error(got: np.ndarray | torch.Tensor, want: np.ndarray) -> float:
    """max |difference| / max |logit|; infinite when anything is not finite."""
    got = np.asarray(got, dtype=np.float64)
    assert got.shape == want.shape
    if not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got - want).max() / np.abs(want).max())


# --- Checkpoints --------------------------------------------------------------


def save(
    model: Qwen3_5MoeForCausalLM,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    multimodal: bool = False,
    fused_experts: bool = True,
    exact_decay: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """What save_pretrained writes: alone, or as the language model of a multimodal checkpoint.

    transformers writes one tensor per expert unless told to keep them fused, as the published
    checkpoints have them. `exact_decay` keeps A_log and the gated norms in fp32, as those do.
    """
    writer: torch.nn.Module = model
    if multimodal:
        writer = _multimodal(model)
    copy = type(writer)(writer.config)
    copy.load_state_dict(writer.state_dict())
    if not multimodal and model.config.tie_word_embeddings:
        copy.tie_weights()
    copy.to(dtype)
    copy.save_pretrained(
        path, save_original_format=not fused_experts, max_shard_size=max_shard_size
    )
    if multimodal:
        _add_mtp(path, model.config.hidden_size, dtype)
    if exact_decay:
        _widen(path, ("A_log", "linear_attn.norm.weight"))
    save_tokenizer(path, model.config.vocab_size)
    return path


def _multimodal(model: Qwen3_5MoeForCausalLM) -> Qwen3_5MoeForConditionalGeneration:
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": model.config.hidden_size,
        "num_position_embeddings": 16,
        "patch_size": 4,
    }
    config = Qwen3_5MoeConfig(
        text_config=model.config.to_dict(),
        vision_config=vision,
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    whole = Qwen3_5MoeForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    return whole


def _weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def _add_mtp(path: Path, hidden: int, dtype: torch.dtype) -> None:
    """Tensors of the multi-token-prediction head that published checkpoints carry."""
    mtp = {
        "mtp.fc.weight": torch.zeros(hidden, 2 * hidden, dtype=dtype),
        "mtp.layers.0.input_layernorm.weight": torch.zeros(hidden, dtype=dtype),
        "mtp.norm.weight": torch.zeros(hidden, dtype=dtype),
    }
    index = path / "model.safetensors.index.json"
    if index.exists():
        save_file(mtp, path / "model-mtp.safetensors", metadata={"format": "pt"})
        table = json.loads(index.read_text())
        table["weight_map"] |= dict.fromkeys(mtp, "model-mtp.safetensors")
        index.write_text(json.dumps(table))
    else:
        (only,) = _weight_files(path)
        save_file(load_file(only) | mtp, only, metadata={"format": "pt"})


def _widen(path: Path, endings: tuple[str, ...]) -> None:
    for file in _weight_files(path):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith(endings):
                tensors[name] = tensors[name].float()
        save_file(tensors, file, metadata={"format": "pt"})


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Bytes as tokens, and as many of the special tokens as fit."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(itertools.islice(alphabet, vocab_size - 3))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(path)


# --- Straight into the core, with no checkpoint -------------------------------

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_identity = itertools.count()


def core_config(config: Qwen3_5MoeTextConfig) -> _core.ModelConfig:
    rope = config.rope_parameters
    fields = [*SMALL, "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings"]
    values = {name: rope[name] if name in rope else getattr(config, name) for name in fields}
    return _core.ModelConfig(**values)


def core_model(
    model: Qwen3_5MoeForCausalLM,
    *,
    recipe: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    devices: tuple[str, ...] = ("cpu",),
    split: tuple[int, ...] = (),
    threads: int = 2,
    checkpoint: str | None = None,
) -> _core.Model:
    """The weights of `model` in the core. Without `checkpoint` the copy is shared with no other."""
    core = _core.Model(
        config=core_config(model.config),
        recipe=recipe,
        dtype=DTYPES[dtype],
        checkpoint=checkpoint or f"oracle {next(_identity)}",
        devices=devices,
        split=split,
        threads=threads,
    )
    tensors = {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    for slot in core.slots:
        if not slot.resident:
            tensor = tensors[slot.fqn].to(dtype).contiguous()
            assert list(tensor.shape) == slot.shape
            core.put(slot.fqn, tensor.view(torch.uint8).numpy(), DTYPES[dtype])
    core.finish()
    return core


def core_engine(model: _core.Model, **settings) -> _core.Engine:
    defaults = {"max_sessions": 4, "max_context": 512, "kv_dtype": "float32", "eos_token_ids": []}
    return _core.Engine(model, **(defaults | settings))


def core_logits(engine: _core.Engine, session: int, vocab: int) -> bytes:
    out = np.empty(vocab, dtype=np.float32)
    engine.logits(session, out)
    assert np.isfinite(out).all(), "a logit is not finite"
    return out.tobytes()
