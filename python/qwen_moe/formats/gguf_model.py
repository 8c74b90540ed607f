"""A qwen35moe GGUF as the model of this engine: its config, and the weights under their FQNs.

The converter of llama.cpp changes some tensors, which is undone here: zero-centred norms are stored
as 1 + w, A_log as -exp(A_log), the taps of the convolution without their middle dimension. Where
there are more value heads than key heads it also reorders value heads, from grouped by key head
(k0 v0, k0 v1, k1 v0, k1 v1) to tiled (k0 v0, k1 v0, k0 v1, k1 v1).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_moe._core import ModelConfig
from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.formats.gguf import Place, reshaped, tensor
from qwen_moe.shards import Shards, StoredTensor
from qwen_moe.weights import Codes, Extent, Weight, common_codes

ARCHITECTURE = "qwen35moe"

_GLOBAL = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "attn_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "attn_gate.weight": "linear_attn.in_proj_z.weight",
    "ssm_beta.weight": "linear_attn.in_proj_b.weight",
    "ssm_alpha.weight": "linear_attn.in_proj_a.weight",
    "ssm_conv1d.weight": "linear_attn.conv1d.weight",
    "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias",
    "ssm_norm.weight": "linear_attn.norm.weight",
    "ssm_out.weight": "linear_attn.out_proj.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_inp_shexp.weight": "mlp.shared_expert_gate.weight",
    "ffn_gate_shexp.weight": "mlp.shared_expert.gate_proj.weight",
    "ffn_up_shexp.weight": "mlp.shared_expert.up_proj.weight",
    "ffn_down_shexp.weight": "mlp.shared_expert.down_proj.weight",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_gate_exps.weight": "mlp.experts.gate_proj",
    "ffn_up_exps.weight": "mlp.experts.up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
_NAME = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True, eq=False)
class Rearranged(Weight):
    """A weight with its rows or columns in another order, or its values mapped.

    Attributes:
        source: The weight in the file.
        rows: Entry i is entry rows[i] of the source; None keeps them.
        columns: The same of the last dimension.
        values: Changes float32 values; None keeps them.
        run: Columns that stay together at least.
    """

    source: Weight
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    values: Callable[[torch.Tensor], torch.Tensor] | None = None
    run: int = 1

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the source."""
        return self.source.name

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of the source."""
        return self.source.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """Of the source, unless values are changed."""
        return self.source.dtype if self.values is None else "float32"

    @property
    def file(self) -> Path:  # type: ignore[override]
        """Of the source."""
        return self.source.file

    @property
    def codes(self) -> Codes | None:
        """Those of the source, when their groups stay whole."""
        codes = self.source.codes
        if codes is None or self.values is not None:
            return None
        return codes if self.columns is None or self.run % codes.group == 0 else None

    def describe(self) -> str:
        """Of the source."""
        return self.source.describe()

    def tensors(self) -> Iterable[StoredTensor]:
        """Of the source."""
        return self.source.tensors()

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of entries [begin, end) of the leading dimension."""
        got = self._gather(self.source.read, shards, begin, end)
        return got if self.values is None else self.values(got.float())

    def read_coded(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Codes and scales of entries [begin, end) of the leading dimension."""
        return self._gather(self.source.read_coded, shards, begin, end)

    def _gather(
        self, read: Callable[[Shards, int, int], torch.Tensor], shards: Shards, begin: int, end: int
    ) -> torch.Tensor:
        if self.rows is None:
            got = read(shards, begin, end)
        else:
            wanted = self.rows[begin:end]
            breaks = ((wanted[1:] - wanted[:-1]) != 1).nonzero().flatten() + 1
            runs = wanted.tensor_split(breaks)
            got = torch.cat([read(shards, int(run[0]), int(run[-1]) + 1) for run in runs])
        return got if self.columns is None else got[..., self.columns].contiguous()


@dataclass(frozen=True, slots=True)
class GateUp(Weight):
    """Gate and up projections of all experts, [experts, n, k] each, as [experts, 2 n, k]."""

    gate: Weight
    up: Weight

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of both."""
        return f"{self.gate.name} with {self.up.name}"

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[experts, rows of both, input features]."""
        experts, rows, inputs = self.gate.shape
        return (experts, rows + self.up.shape[1], inputs)

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """Of both, or float32 when they differ."""
        return self.gate.dtype if self.gate.dtype == self.up.dtype else "float32"

    @property
    def file(self) -> Path:  # type: ignore[override]
        """Of the gate."""
        return self.gate.file

    @property
    def codes(self) -> Codes | None:
        """What both have in common."""
        return common_codes([self.gate, self.up])

    @property
    def plain(self) -> bool:
        """Both are, in one dtype."""
        return self.gate.plain and self.up.plain and self.gate.dtype == self.up.dtype

    def extents(self, begin: int, end: int) -> list[Extent]:
        """Gate and up of one expert, then of the next."""
        return [
            extent
            for expert in range(begin, end)
            for part in (self.gate, self.up)
            for extent in part.extents(expert, expert + 1)
        ]

    def describe(self) -> str:
        """Both, for errors."""
        return f"{self.gate.describe()} with {self.up.describe()}"

    def tensors(self) -> Iterable[StoredTensor]:
        """Of both."""
        return (*self.gate.tensors(), *self.up.tensors())

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of experts [begin, end)."""
        both = [part.read(shards, begin, end) for part in (self.gate, self.up)]
        if self.dtype == "float32":
            both = [part.float() for part in both]
        return self._join(both, end - begin)

    def read_coded(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Codes and scales of experts [begin, end)."""
        both = [part.read_coded(shards, begin, end) for part in (self.gate, self.up)]
        return self._join(both, end - begin)

    def _join(self, both: list[torch.Tensor], experts: int) -> torch.Tensor:
        return torch.cat([part.view(experts, -1, self.shape[2]) for part in both], 1)


def raw_config(
    metadata: Mapping[str, Any], places: Mapping[str, Place], source: str
) -> dict[str, Any]:
    """The model's dimensions, as config.json has them.

    Raises:
        InvalidArgument: Another architecture.
        FormatError: A field is missing.
    """
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise InvalidArgument(
            f"{source}: general.architecture is {architecture!r}; this engine runs {ARCHITECTURE}"
        )

    def field(name: str) -> Any:  # noqa: ANN401 - checked by parse_config
        value = metadata.get(f"{ARCHITECTURE}.{name}")
        if value is None:
            raise FormatError(f"{source}: {ARCHITECTURE}.{name} is missing in the metadata")
        return max(value) if isinstance(value, list) else value

    embedding = places.get("token_embd.weight")
    if embedding is None:
        raise FormatError(f"{source}: token_embd.weight is missing")
    value_heads, head_dim = field("ssm.time_step_rank"), field("attention.key_length")
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": embedding.stored.shape[0],
        "hidden_size": field("embedding_length"),
        "num_hidden_layers": layers(metadata, source),
        "full_attention_interval": metadata.get(f"{ARCHITECTURE}.full_attention_interval", 4),
        "num_attention_heads": field("attention.head_count"),
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head_dim,
        "linear_num_key_heads": field("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_key_head_dim": field("ssm.state_size"),
        "linear_value_head_dim": field("ssm.inner_size") // value_heads,
        "linear_conv_kernel_dim": field("ssm.conv_kernel"),
        "num_experts": field("expert_count"),
        "num_experts_per_tok": field("expert_used_count"),
        "moe_intermediate_size": field("expert_feed_forward_length"),
        "shared_expert_intermediate_size": field("expert_shared_feed_forward_length"),
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
        "partial_rotary_factor": field("rope.dimension_count") / head_dim,
        "tie_word_embeddings": "output.weight" not in places,
    }


def layers(metadata: Mapping[str, Any], source: str) -> int:
    """Layers of the model itself: blocks for multi-token prediction come after them."""
    blocks = metadata.get(f"{ARCHITECTURE}.block_count")
    if not isinstance(blocks, int):
        raise FormatError(f"{source}: {ARCHITECTURE}.block_count is {blocks!r} in the metadata")
    return blocks - int(metadata.get(f"{ARCHITECTURE}.nextn_predict_layers", 0))


def fqn(name: str, count: int) -> str | None:
    """The FQN of a GGUF tensor, or its own name when it is not one of the model's.

    None for blocks past the model's layers, which predict further tokens.
    """
    block = _NAME.fullmatch(name)
    if block is None:
        return _GLOBAL.get(name, name)
    if int(block[1]) >= count:
        return None
    known = _LAYER.get(block[2])
    return f"layers.{int(block[1])}.{known}" if known else name


def assemble(places: Mapping[str, Place], model: ModelConfig) -> dict[str, Weight]:
    """Weights by FQN, as the model class has them.

    Raises:
        FormatError: A tensor has a type that is not read.
    """
    named = {fqn(name, model.num_hidden_layers): place for name, place in places.items()}
    weights = {key: _weight(key, place, model) for key, place in named.items() if key is not None}
    for key in [key for key in weights if key.endswith(".experts.gate_proj")]:
        experts = key.removesuffix("gate_proj")
        up = weights.pop(f"{experts}up_proj", None)
        if up is None:
            raise FormatError(f"{weights[key].describe()}: the up projection beside it is missing")
        weights[f"{experts}gate_up_proj"] = GateUp(weights.pop(key), up)
    return weights


def _weight(key: str, place: Place, model: ModelConfig) -> Weight:
    shape = place.stored.shape
    if key.endswith("conv1d.weight") and len(shape) == 2:
        place = reshaped(place, (shape[0], 1, shape[1]))
    elif key.endswith("shared_expert_gate.weight") and len(shape) == 1:
        place = reshaped(place, (1, *shape))
    weight = tensor(place)
    if key.endswith("norm.weight") and not key.endswith("linear_attn.norm.weight"):
        return Rearranged(weight, values=lambda stored: stored - 1)
    heads, size = model.linear_num_value_heads, model.linear_value_head_dim
    _, found, kind = key.partition(".linear_attn.")
    if not found:
        return weight
    grouped = _grouped(model.linear_num_key_heads, heads)
    skip = 2 * model.linear_num_key_heads * model.linear_key_head_dim  # rows of q and k
    if kind in ("in_proj_qkv.weight", "conv1d.weight"):
        values = skip + _spread(grouped, size)
        return Rearranged(weight, rows=torch.cat([torch.arange(skip), values]))
    if kind == "in_proj_z.weight":
        return Rearranged(weight, rows=_spread(grouped, size))
    if kind == "out_proj.weight":
        return Rearranged(weight, columns=_spread(grouped, size), run=size)
    if kind == "A_log":
        return Rearranged(weight, rows=grouped, values=lambda stored: (-stored).log())
    if kind in ("in_proj_a.weight", "in_proj_b.weight", "dt_bias"):
        return Rearranged(weight, rows=grouped)
    return weight


def _grouped(key_heads: int, value_heads: int) -> torch.Tensor:
    """For each value head in the order of the model class, its place in the file."""
    return torch.arange(value_heads).view(-1, key_heads).T.flatten()


def _spread(heads: torch.Tensor, size: int) -> torch.Tensor:
    """The same of single features, `size` of them in a head."""
    return (heads.unsqueeze(1) * size + torch.arange(size)).flatten()
