"""The same models as GGUF files, by the tensor names of the gguf package and with what the
converter of llama.cpp does to the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch

import foreign
from foreign import Tensors, Written

Kind = gguf.GGMLQuantizationType
KEPT = (Kind.Q8_0, Kind.Q4_0)
EXACT = ("embed_tokens", "in_proj_a", "in_proj_b", "mlp.gate.", "shared_expert_gate")


def write(
    file: Path,
    source: tuple[dict, Tensors],
    kind: Callable[[str], Kind],
    *,
    tokenizer: bool = False,
    splits: int = 1,
    changes: Mapping[str, object] | None = None,
) -> Written:
    """Matrices become what `kind` says of their FQN; norms, vectors and taps stay float32.

    The values of `Written.weights` are rounded as the engine loads them.
    """
    config, tensors = source
    file.parent.mkdir(parents=True, exist_ok=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35MOE, config["num_hidden_layers"])
    dense = torch.float16 if kind("embed_tokens.weight") == Kind.F16 else torch.bfloat16
    weights: Tensors = {}
    stored: dict[str, tuple[np.ndarray, Kind]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.float()
        data = converted(name, tensor, config)
        chosen = kind(name.removeprefix("model."))
        if data.dim() == 1 or name.endswith("conv1d.weight"):
            chosen = Kind.F32
        elif data.shape[-1] % 256 and chosen in (Kind.Q4_K, Kind.Q6_K):
            chosen = Kind.Q8_0  # as llama.cpp falls back
        raw = quantized(data.numpy(), chosen)
        values = torch.from_numpy(np.array(gguf.dequantize(raw, chosen))).view(data.shape)
        if chosen == Kind.F32:
            weights[name] = tensor
        else:
            # Where each element of the file comes from says where its value goes.
            at = converted(name, torch.arange(tensor.numel()).view(tensor.shape), config)
            back = torch.empty(tensor.numel())
            back[at.flatten()] = values.flatten()
            exact = chosen not in KEPT or any(part in name for part in EXACT)
            weights[name] = (back.to(dense).float() if exact else back).view(tensor.shape)
        key = name.replace(".dt_bias", ".dt_proj.bias")
        if name.endswith("experts.gate_up_proj"):
            for part, half in (("gate_proj", 0), ("up_proj", 1)):
                half_name = name.replace("gate_up_proj", part)
                rows = data.chunk(2, 1)[half].numpy()
                stored[renamed(names, half_name)] = (quantized(rows, chosen), chosen)
        else:
            stored[renamed(names, key)] = (raw, chosen)
    files = [file]
    if splits > 1:
        stem = file.name.removesuffix(".gguf")
        files = [file.with_name(f"{stem}-{i + 1:05}-of-{splits:05}.gguf") for i in range(splits)]
    for index, path in enumerate(files):
        writer = gguf.GGUFWriter(path, "qwen35moe")
        if index == 0:
            metadata(writer, config, changes or {})
            if tokenizer:
                vocabulary(writer)
        for name in list(stored)[index::splits]:
            data, chosen = stored[name]
            writer.add_tensor(name, data, raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Written(files[0], config, weights)


def renamed(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, f"llama.cpp has no name for {name}"
    return found if found.endswith((".weight", ".bias", "ssm_a")) else f"{found}.weight"


def converted(name: str, tensor: torch.Tensor, config: dict) -> torch.Tensor:
    """What the converter makes of a tensor. Integers are element numbers, and are only moved."""
    values = tensor.is_floating_point()
    if values and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        tensor = tensor + 1
    if values and name.endswith("A_log"):
        tensor = -tensor.exp()
    if name.endswith(("conv1d.weight", "shared_expert_gate.weight")):
        tensor = tensor.squeeze()
    if ".linear_attn." not in name:
        return tensor.contiguous()
    key_heads, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size = config["linear_value_head_dim"]
    skip = 2 * key_heads * config["linear_key_head_dim"]

    def tiled(part: torch.Tensor, each: int, dim: int = 0) -> torch.Tensor:
        apart = part.unflatten(dim, (key_heads, heads // key_heads, each))
        return apart.transpose(dim, dim + 1).flatten(dim, dim + 2)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        tensor = torch.cat([tensor[:skip], tiled(tensor[skip:], size)])
    elif name.endswith("in_proj_z.weight"):
        tensor = tiled(tensor, size)
    elif name.endswith("out_proj.weight"):
        tensor = tiled(tensor, size, 1)
    elif name.endswith(("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias")):
        tensor = tiled(tensor, 1)
    return tensor.contiguous()


def metadata(writer: gguf.GGUFWriter, config: dict, changes: Mapping[str, object]) -> None:
    rope = config["rope_parameters"]
    interval = config["layer_types"].index("full_attention") + 1
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": int(config["head_dim"] * rope["partial_rotary_factor"]),
        "expert_count": config["num_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_feed_forward_length": config["shared_expert_intermediate_size"],
        "ssm.conv_kernel": config["linear_conv_kernel_dim"],
        "ssm.state_size": config["linear_key_head_dim"],
        "ssm.group_count": config["linear_num_key_heads"],
        "ssm.time_step_rank": config["linear_num_value_heads"],
        "ssm.inner_size": config["linear_num_value_heads"] * config["linear_value_head_dim"],
        "full_attention_interval": interval,
    }
    for name, value in (fields | changes).items():
        if value is not None:
            writer.add_uint32(f"qwen35moe.{name}", value)
    writer.add_float32("qwen35moe.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_float32("qwen35moe.rope.freq_base", rope["rope_theta"])


def vocabulary(writer: gguf.GGUFWriter) -> None:
    """The tokenizer of the embedded checkpoint, as the converter writes one."""
    tokenizer = json.loads((foreign.TINY / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"] | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    control = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen35")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocab["<|im_end|>"])
    writer.add_pad_token_id(vocab["<|endoftext|>"])
    writer.add_chat_template((foreign.TINY / "chat_template.jinja").read_text())


# --- Blocks that the package only reads ----------------------------------------


def quantized(data: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == Kind.Q4_K:
        return q4_k(data)
    if kind == Kind.Q6_K:
        return q6_k(data)
    return gguf.quantize(data, kind)


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 as its bytes, and its values."""
    half = values.astype(np.float16)
    return half.view(np.uint8).reshape(len(half), -1), half.astype(np.float32)


def ratio(values: np.ndarray, over: np.ndarray) -> np.ndarray:
    return np.divide(values, over, out=np.zeros_like(values), where=over != 0)


def q4_k(data: np.ndarray) -> np.ndarray:
    """d * scale * code - dmin * min: 8 scales and mins of 6 bits for 256 codes of 4 bits."""
    blocks = data.reshape(-1, 8, 32).astype(np.float32)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    d_bytes, d = halves((high - low).max(1, keepdims=True) / 15 / 63)
    m_bytes, m = halves(-low.min(1, keepdims=True) / 63)
    scale = np.clip(np.round(ratio((high - low) / 15, d + 0 * low)), 0, 63)
    least = np.clip(np.round(ratio(-low, m + 0 * low)), 0, 63)
    shifted = blocks + (m * least)[..., None]
    codes = np.clip(np.round(ratio(shifted, (d * scale)[..., None] + 0 * blocks)), 0, 15)
    s, n, q = (x.astype(np.uint8) for x in (scale, least, codes))
    packed = [
        s[:, :4] | (s[:, 4:] >> 4) << 6,
        n[:, :4] | (n[:, 4:] >> 4) << 6,
        (s[:, 4:] & 15) | (n[:, 4:] & 15) << 4,
    ]
    nibbles = (q[:, 0::2] | q[:, 1::2] << 4).reshape(len(q), -1)
    rows = np.concatenate([d_bytes, m_bytes, *packed, nibbles], 1)
    return rows.reshape(*data.shape[:-1], -1)


def q6_k(data: np.ndarray) -> np.ndarray:
    """d * scale * (code - 32): 16 scales of 8 bits for 256 codes of 6 bits."""
    blocks = data.reshape(-1, 16, 16).astype(np.float32)
    want = np.abs(blocks).max(-1) / 31
    d_bytes, d = halves(want.max(1, keepdims=True) / 127)
    scale = np.round(ratio(want, d + 0 * want))
    codes = np.round(ratio(blocks, (d * scale)[..., None] + 0 * blocks))
    codes = (np.clip(codes, -32, 31) + 32).astype(np.uint8)
    low = (codes & 15).reshape(-1, 2, 2, 64)
    high = (codes >> 4).reshape(-1, 2, 4, 32)
    ql = (low[:, :, 0] | low[:, :, 1] << 4).reshape(len(codes), -1)
    qh = sum(high[:, :, i] << (2 * i) for i in range(4)).astype(np.uint8).reshape(len(codes), -1)
    scales = scale.astype(np.int8).view(np.uint8)
    return np.concatenate([ql, qh, scales, d_bytes], 1).reshape(*data.shape[:-1], -1)
