"""The engine against transformers in fp32: the same logits, the same greedy tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3_5MoeForCausalLM

import oracle
import qwen_moe

TOLERANCE = 1e-4  # max |difference| / max |logit|
LENGTH = 200
STEPS = 64
GREEDY = qwen_moe.SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """A model, and how its checkpoint is written."""

    config: dict = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    checkpoint: dict = field(default_factory=dict)


CASES = {
    "bf16": Case(),
    "one tensor per expert, sharded": Case(
        checkpoint={"fused_experts": False, "max_shard_size": "400KB"}
    ),
    "multimodal, sharded, mixed dtypes": Case(
        checkpoint={"multimodal": True, "max_shard_size": "2MB", "exact_decay": True}
    ),
    "fp16, tied head, k-heads = v-heads, every expert": Case(
        {
            "tie_word_embeddings": True,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "linear_num_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 4,
        },
        torch.float16,
    ),
    "fp32, odd sizes, full attention first": Case(
        {
            "vocab_size": 301,
            "hidden_size": 96,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 96,
        },
        torch.float32,
    ),
    "other head sizes, rotary share, kernel and eps": Case(
        {
            "head_dim": 64,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 96,
            "linear_conv_kernel_dim": 3,
            "num_experts_per_tok": 1,
            "rms_norm_eps": 1e-3,
        },
        torch.float32,
    ),
    "tied multimodal in one file": Case(
        {"tie_word_embeddings": True, "layer_types": ["linear_attention", "full_attention"]},
        checkpoint={"multimodal": True, "fused_experts": False},
    ),
}


@dataclass(frozen=True)
class Parity:
    model: Qwen3_5MoeForCausalLM
    engine: qwen_moe.Engine
    reference: oracle.Reference

    def assert_logits(self, session: qwen_moe.Session, position: int) -> None:
        error = oracle.relative_error(session.logits, self.reference.logits[position - 1])
        assert error <= TOLERANCE, f"logits after {position} tokens are off by {error:.2e}"

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    @property
    def ids(self) -> list[int]:
        return self.reference.prompt + self.reference.continuation


def open_case(case: Case, path: Path) -> Parity:
    config = oracle.text_config(**case.config)
    model, reference = oracle.find_reference(config, dtype=case.dtype, length=LENGTH, steps=STEPS)
    oracle.save(model, path, dtype=case.dtype, **case.checkpoint)
    engine = qwen_moe.Engine(
        path, device="cpu", quantize=None, kv_dtype="float32", max_sessions=2, max_context=320
    )
    return Parity(model, engine, reference)


@pytest.fixture(scope="module", params=CASES)
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    opened = open_case(CASES[request.param], tmp_path_factory.mktemp("parity") / "model")
    with opened.engine:
        yield opened


# Around the edges of a 64-token chunk and page, and several of them.
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 128, 129, 200])
def test_prefill_gives_the_reference_logits(parity: Parity, length: int) -> None:
    with parity.engine.session() as session:
        session.prefill(parity.ids[:length])
        parity.assert_logits(session, length)


@pytest.mark.parametrize(
    "pieces",
    [
        [1] * 5 + [60, 1, 2],
        [63, 1, 1],
        [64, 64],
        [65, 63, 72],
        [3, 125, 1, 71],
        [100, 100, 60],
        [129, 1, 70],
    ],
    ids=str,
)
def test_prefill_in_pieces_gives_the_reference_logits(parity: Parity, pieces: list[int]) -> None:
    with parity.engine.session() as session:
        position = 0
        for piece in pieces:
            session.prefill(parity.ids[position : position + piece])
            position += piece
            assert session.position == position
            parity.assert_logits(session, position)


def test_decode_after_prefill_gives_the_reference_logits_and_tokens(parity: Parity) -> None:
    with parity.engine.session() as session:
        session.prefill(parity.reference.prompt)
        for i, token in enumerate(parity.reference.continuation):
            assert session.decode(GREEDY).token_id == token
            parity.assert_logits(session, LENGTH + i)  # those that it was drawn from


def test_decode_from_the_first_token_gives_the_reference_logits(parity: Parity) -> None:
    with parity.engine.session() as session:
        session.prefill(parity.ids[:1])
        rows = []
        for _ in range(70):
            session.decode(GREEDY)
            rows.append(session.logits.numpy())  # those that the token was drawn from
        want = parity.logits(session.tokens[:70])
    for position, row in enumerate(rows):
        error = oracle.relative_error(row, want[position])
        assert error <= TOLERANCE, f"logits at position {position} are off by {error:.2e}"


def test_generate_gives_the_reference_tokens(parity: Parity) -> None:
    (generation,) = parity.engine.generate([parity.reference.prompt], GREEDY)
    assert generation.token_ids == parity.reference.continuation
    assert generation.prompt_tokens == LENGTH
    assert generation.finish_reason == "length"


def test_a_prefill_after_decode_continues_the_same_timeline(parity: Parity) -> None:
    with parity.engine.session() as session:
        session.prefill(parity.reference.prompt[:70])
        drawn = [session.decode(GREEDY).token_id for _ in range(3)]
        session.prefill([7, 8, 9])
        assert session.tokens == parity.reference.prompt[:70] + drawn + [7, 8, 9]
        error = oracle.relative_error(session.logits, parity.logits(session.tokens)[-1])
        assert error <= TOLERANCE


@pytest.fixture(scope="module")
def tiny_reference():
    """The embedded checkpoint in transformers, and its logits after each token of English text."""
    path = Path(qwen_moe.__file__).parent / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with qwen_moe.Engine(device="cpu", max_sessions=1, max_context=64) as engine:
        ids = list(engine.tokenizer.encode(TEXT))
    assert len(ids) > 100
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    return ids, logits


TEXT = """The old man went down to the sea in the morning, and the wind was in the west. He had a
small boat, and in it there was bread and water for three days. "Where are you going?" said the
boy. "I am going to the island," said he, "for there is a house upon it, and in the house there is
a light." And the boy stood and looked after him until he could see the boat no more. Then he
turned, and went up the hill to his mother, who asked him what he had seen. "I have seen a man go
out upon the sea," he said, "and I do not think that he will come again." But she laughed, and set
the table, and told him that the man came home every evening."""


def tiny_logits(ids: list[int], **settings) -> torch.Tensor:
    with qwen_moe.Engine(device="cpu", max_sessions=1, max_context=512, **settings) as engine:
        session = engine.session()
        rows = []
        for token in ids:
            session.prefill([token])
            rows.append(session.logits.clone())
        session.close()
    return torch.stack(rows)


def divergence(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Mean KL(want || got) in nats, and the share of positions with the same likeliest token."""
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    return float(kl), float((got.argmax(-1) == want.argmax(-1)).float().mean())


def test_the_embedded_checkpoint_gives_the_reference_logits(tiny_reference) -> None:
    ids, want = tiny_reference
    got = tiny_logits(ids, quantize=None, kv_dtype="float32")
    assert oracle.relative_error(got, want.numpy()) <= TOLERANCE


# About twice the divergence that was measured.
@pytest.mark.parametrize(
    ("quantize", "most_kl", "least_same"),
    [(None, 1e-4, 0.98), ("int8", 0.001, 0.97), ("int4", 0.05, 0.80), ("int4-all", 0.06, 0.80)],
)
def test_a_recipe_stays_close_to_the_reference(
    tiny_reference, quantize: str | None, most_kl: float, least_same: float
) -> None:
    ids, want = tiny_reference
    kl, same = divergence(tiny_logits(ids, quantize=quantize, kv_dtype="bfloat16"), want)
    assert kl <= most_kl, f"KL {kl:.4f}, same {same:.3f}"
    assert same >= least_same, f"KL {kl:.4f}, same {same:.3f}"
    if quantize:
        assert kl > 1e-6, "the recipe changed nothing"


def test_a_saved_checkpoint_has_what_the_cases_claim(tmp_path: Path) -> None:
    """Guards the cases themselves: layouts, shards, and tensors that the engine must skip."""
    model = oracle.random_model(oracle.text_config(layer_types=["linear_attention"]))
    single = oracle.save(model, tmp_path / "a", fused_experts=True)
    assert not (single / "model.safetensors.index.json").exists()
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensor_names(single)

    case = CASES["multimodal, sharded, mixed dtypes"]
    several = oracle.save(model, tmp_path / "b", **case.checkpoint | {"max_shard_size": "400KB"})
    weight_map = json.loads((several / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    names = tensor_names(several)
    assert names["model.language_model.layers.0.linear_attn.A_log"] == torch.float32
    assert names["model.language_model.layers.0.linear_attn.dt_bias"] == torch.bfloat16
    assert any(name.startswith("mtp.") for name in names)
    assert any(name.startswith("model.visual.") for name in names)
    config = json.loads((several / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForConditionalGeneration"]
    assert "num_experts" in config["text_config"]

    apart = tensor_names(oracle.save(model, tmp_path / "c", fused_experts=False))
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in apart


def tensor_names(path: Path) -> dict[str, torch.dtype]:
    return {
        name: tensor.dtype
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_the_reference_is_decided_and_depends_on_its_past() -> None:
    """Guards the oracle: other early tokens must change late logits by far more than the bound."""
    config = oracle.text_config()
    model, reference = oracle.find_reference(config, dtype=torch.bfloat16, length=100, steps=16)
    changed = [reference.prompt[0] ^ 1, *reference.prompt[1:]]
    other = oracle.reference(model, changed, steps=1)
    error = oracle.relative_error(other.logits[99], reference.logits[99])
    assert error > 100 * TOLERANCE
    assert np.abs(reference.logits).max() > 5
