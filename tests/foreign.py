"""The embedded checkpoint as other tools would have quantized it, and the weights that this means.

Every writer makes the layout of the published checkpoints: names under `model.language_model.`,
one matrix per expert, config.json with `text_config` and `quantization_config`. What a matrix
becomes is up to a `Quantizer`; `Written.weights` are the values that its tensors stand for.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

import oracle
import qwen_moe

TINY = Path(qwen_moe.__file__).parent / "models" / "tiny"
Tensors = dict[str, torch.Tensor]
# A matrix [n, k] float32 -> the tensors of its module by suffix, and the values they stand for.
Quantizer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]

EXPERTS = (".experts.",)
LINEARS = (*EXPERTS, ".shared_expert.", ".in_proj_qkv.", ".in_proj_z.", "_proj.")
NEVER = (".in_proj_a.", ".in_proj_b.", "embed_tokens", "lm_head")


@dataclass(frozen=True)
class Written:
    """A checkpoint directory, and its weights in float32 under the names of transformers."""

    path: Path
    config: dict
    weights: Tensors

    def model(self) -> Qwen3_5MoeForCausalLM:
        """The same weights in transformers."""
        config = Qwen3_5MoeTextConfig(**self.config)
        config._attn_implementation = config._experts_implementation = "eager"
        model = Qwen3_5MoeForCausalLM(config).eval()
        weights = dict(self.weights)
        if config.tie_word_embeddings:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        model.load_state_dict(weights)
        return model

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of transformers: [ids, vocab] float32."""
        return self.model()(torch.tensor([ids]), use_cache=False).logits[0]


def tiny() -> tuple[dict, Tensors]:
    """Config and tensors of the embedded checkpoint, experts fused."""
    config = json.loads((TINY / "config.json").read_text())
    return config, load_file(TINY / "model.safetensors")


def random(**changes: object) -> tuple[dict, Tensors]:
    """Config and tensors of a random model with a head that is not tied."""
    config = oracle.text_config(**changes)
    model = oracle.random_model(config)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    return json.loads(json.dumps(config.to_dict())), tensors


def unfused(tensors: Tensors) -> Tensors:
    """One matrix per expert, in place of the fused ones."""
    apart: Tensors = {}
    for name, tensor in tensors.items():
        experts, _, kind = name.rpartition(".")
        if not experts.endswith(".experts"):
            apart[name] = tensor
        elif kind == "down_proj":
            apart |= {f"{experts}.{i}.down_proj.weight": e for i, e in enumerate(tensor)}
        else:
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                apart[f"{experts}.{i}.gate_proj.weight"] = gate
                apart[f"{experts}.{i}.up_proj.weight"] = up
    return apart


def fused(tensors: Tensors) -> Tensors:
    """The inverse of `unfused`."""
    whole: Tensors = {}
    for name, tensor in tensors.items():
        experts, found, rest = name.partition(".experts.")
        if not found or rest in ("gate_up_proj", "down_proj"):
            whole[name] = tensor
        elif rest == "0.gate_proj.weight" or rest == "0.down_proj.weight":
            kind = rest.split(".")[1]
            count = sum(
                other.startswith(f"{experts}.experts.") and other.endswith(f".{kind}.weight")
                for other in tensors
            )

            def expert(index: int, part: str, at: str = experts) -> torch.Tensor:
                return tensors[f"{at}.experts.{index}.{part}.weight"]

            if kind == "down_proj":
                rows = [expert(i, kind) for i in range(count)]
                whole[f"{experts}.experts.down_proj"] = torch.stack(rows)
            else:
                rows = [torch.cat([expert(i, kind), expert(i, "up_proj")]) for i in range(count)]
                whole[f"{experts}.experts.gate_up_proj"] = torch.stack(rows)
    return whole


def write(
    path: Path,
    source: tuple[dict, Tensors],
    settings: dict | None,
    quantize: Quantizer,
    *,
    only: tuple[str, ...] = LINEARS,
    keep_fused: bool = False,
) -> Written:
    """Quantize every matrix with a name that holds one of `only`; leave the others as they are."""
    config, tensors = source
    stored: Tensors = {}
    weights: Tensors = {}
    for name, tensor in (tensors if keep_fused else unfused(tensors)).items():
        nested = name.replace("model.", "model.language_model.", 1)
        weights[name] = tensor.float()
        chosen = any(part in f"{name}." for part in only) and not any(n in name for n in NEVER)
        if not chosen or tensor.dim() < 2:
            stored[nested] = tensor.contiguous().clone()
            continue
        parts, weights[name] = quantize(tensor.float())
        module = nested.removesuffix(".weight")
        for suffix, part in parts.items():
            joint = "" if suffix.startswith("_") or not suffix else "."
            stored[f"{module}{joint}{suffix}"] = part.contiguous().clone()
    path.mkdir(parents=True)
    save(path, stored, config, settings)
    return Written(path, config, fused(weights))


def save(path: Path, stored: Tensors, config: dict, settings: dict | None) -> None:
    """Two shards with an index, config.json as the multimodal checkpoints have it, a tokenizer."""
    weight_map = {}
    for index in range(2):
        part = {name: stored[name] for name in list(stored)[index::2]}
        file = f"model.safetensors-{index + 1:05}-of-00002.safetensors"
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    text = {key: value for key, value in copy.deepcopy(config).items() if key != "architectures"}
    nested = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text | {"model_type": "qwen3_5_moe_text", "dtype": "bfloat16"},
        "tie_word_embeddings": config["tie_word_embeddings"],
    }
    if settings is not None:
        nested["quantization_config"] = settings
    (path / "config.json").write_text(json.dumps(nested))
    shutil.copy(TINY / "tokenizer.json", path)


def edit(path: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a written checkpoint in place."""
    config = json.loads((path / "config.json").read_text())
    stored: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        stored |= load_file(file)
    change(stored)
    text = config["text_config"] | {"tie_word_embeddings": config["tie_word_embeddings"]}
    save(path, stored, text, config.get("quantization_config"))


def configure(path: Path, **settings: object) -> None:
    """Change quantization_config of a written checkpoint."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= settings
    file.write_text(json.dumps(config))


# --- FP8 -----------------------------------------------------------------------

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.language_model.embed_tokens"],
}


def fp8(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 128 x 128 in e4m3 with a bfloat16 scale; the values are bfloat16, as loaded."""
    *stack, n, k = matrix.shape
    rows, columns = -(-n // 128), -(-k // 128)
    padded = matrix.new_zeros(*stack, rows * 128, columns * 128)
    padded[..., :n, :k] = matrix
    blocks = padded.view(*stack, rows, 128, columns, 128)
    scale = (blocks.abs().amax((-3, -1)) / 448).bfloat16()
    wide = scale.float()[..., :, None, :, None]
    codes = (blocks / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    values = (codes.float() * wide).reshape(padded.shape)[..., :n, :k].bfloat16().float()
    codes = codes.view(torch.uint8).reshape(padded.shape)[..., :n, :k].contiguous()
    codes = codes.view(torch.float8_e4m3fn)
    if stack:
        return {"": codes, "_scale_inv": scale}, values
    return {"weight": codes, "weight_scale_inv": scale}, values


# --- Four bits in int32 words --------------------------------------------------

GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "pack_dtype": "int32",
    "lm_head": False,
    "dynamic": {"-:.*attn.*": {}, "-:.*shared_expert.*": {}, "-:.*mtp.*": {}},
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["shared_expert_gate", "mlp.gate", "lm_head"],
}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "output_activations": None,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": 128,
                "actorder": None,
                "dynamic": False,
            },
        }
    },
}


def words(codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Codes 0 to 15, eight along `dim` to an int32: nibble i holds the code `order[i]`."""
    apart = codes.long().unflatten(dim, (-1, 8))
    packed = sum(apart.select(dim + 1, code) << (4 * i) for i, code in enumerate(order))
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def levels(
    matrix: torch.Tensor, group: int, dtype: torch.dtype, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [n, k], scales and zero points [n, groups], and the values they stand for.

    Scales are a little smaller than the largest weight asks for, as a calibration would have them.
    """
    grouped = matrix.unflatten(1, (-1, group))
    if symmetric:
        scale = grouped.abs().amax(-1) / 7.5 * 0.93
        zero = torch.full_like(scale, 8)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / 15
        zero = (-low / scale).round().clamp(1, 15)
    scale = scale.clamp(min=1e-4).to(dtype)
    wide = scale.float().unsqueeze(-1)
    codes = ((grouped / wide).round() + zero.unsqueeze(-1)).clamp(0, 15)
    values = (codes - zero.unsqueeze(-1)) * wide
    return codes.flatten(1).int(), scale, zero.int(), values.flatten(1)


def gptq(*, group: int = 128, symmetric: bool = True, version: int = 1) -> Quantizer:
    """Modules of qweight, qzeros, scales and g_idx."""

    def quantize(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        each = min(group, matrix.shape[1])
        codes, scale, zero, values = levels(matrix, each, torch.float16, symmetric=symmetric)
        parts = {
            "qweight": words(codes.T, 0),
            "qzeros": words(zero.T - (1 if version == 1 else 0), 1),
            "scales": scale.T,
            "g_idx": torch.arange(matrix.shape[1], dtype=torch.int32) // each,
        }
        return parts, values

    return quantize


def awq(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Modules of qweight, qzeros and scales, output features interleaved. Values as bfloat16."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, scale, zero, values = levels(matrix, 128, torch.float16, symmetric=False)
    parts = {
        "qweight": words(codes.T, 1, order),
        "qzeros": words(zero.T, 1, order),
        "scales": scale.T,
    }
    return parts, values.bfloat16().float()


def compressed(*, symmetric: bool = True) -> Quantizer:
    """Modules of weight_packed, weight_scale, weight_shape and perhaps weight_zero_point."""

    def quantize(matrix: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scale, zero, values = levels(matrix, 128, torch.bfloat16, symmetric=symmetric)
        parts = {
            "weight_packed": words(codes, 1),
            "weight_scale": scale,
            "weight_shape": torch.tensor(matrix.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = words(zero, 0)
            values = values.bfloat16().float()
        return parts, values

    return quantize
