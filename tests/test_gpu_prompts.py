"""Prompts on a GPU: the kernels that take many tokens at once against the step that takes one."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import qwen_moe
from gpu_rig import DEVICE, assert_close, bits, greedy, ids_of, open_engine, text_ids, walk
from qwen_moe import bench

pytestmark = pytest.mark.gpu

LENGTHS = [1, 2, 31, 32, 63, 64, 65, 127, 128, 129, 256, 1000, 4000]
RECIPES = [None, "int4"]
# Of what a session keeps, relative: weights meet the tensor cores as bf16 in one and as codes in
# the other, activations as bf16 and as fp16, and where two experts are about level one takes this
# and the other that.
MOST_STATE = 5e-2
NEARLY_LEVEL = 0.1  # nats between two tokens of which either may be drawn


@functools.cache
def long_ids() -> list[int]:
    return (text_ids() * 50)[:4096]


def states(session: qwen_moe.Session, engine: qwen_moe.Engine) -> dict[str, torch.Tensor]:
    """What the session keeps, by name; the logits row apart."""
    found = {}
    for name, dtype, shape, data in engine.core.export_state(session._id):
        if dtype in ("float32", "bfloat16"):
            kind = torch.float32 if dtype == "float32" else torch.bfloat16
            found[name] = torch.frombuffer(data, dtype=kind).reshape(shape).double()
    return found


@pytest.mark.parametrize("quantize", RECIPES, ids=str)
def test_prompts_of_any_length_leave_what_steps_leave(quantize: str | None) -> None:
    settings = {"quantize": quantize, "max_context": 4096, "max_sessions": 1}
    with open_engine(**settings) as fast, open_engine(**settings, prefill_kernels=False) as slow:
        for length in LENGTHS:
            kept = []
            for engine in (fast, slow):
                with engine.session() as session:
                    session.prefill(long_ids()[:length])
                    kept.append((session.logits[None], states(session, engine)))
            (got, mine), (want, theirs) = kept
            assert_close(got, want)
            assert mine.keys() == theirs.keys()
            for name, state in mine.items():
                error = (state - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-6)
                assert error <= MOST_STATE, f"{length} tokens, {name}: {error:.1e}"


@pytest.mark.parametrize("quantize", RECIPES, ids=str)
def test_a_long_prompt_is_answered_as_on_the_cpu(quantize: str | None) -> None:
    """Token by token, up to where two are about as likely."""
    ids, replies = long_ids()[:2500], []
    for device in ("cpu", DEVICE):
        with open_engine(
            device=device, quantize=quantize, max_context=2600, max_sessions=1
        ) as engine:
            replies += engine.generate([ids], greedy(64))
    want, got = replies
    same = zip(want.token_ids, got.token_ids, strict=True)
    at = next((i for i, (a, b) in enumerate(same) if a != b), None)
    if at is not None:
        likely = dict(want.top_logprobs[at])
        drawn = got.token_ids[at]
        assert likely.get(drawn, -9.0) > max(likely.values()) - NEARLY_LEVEL, f"token {at}"


@pytest.mark.parametrize("quantize", RECIPES, ids=str)
def test_pieces_that_end_on_multiples_of_64_give_the_same_bits(quantize: str | None) -> None:
    ids = long_ids()[:1000]
    with open_engine(quantize=quantize, max_context=1100, max_sessions=3, poison=True) as engine:
        with engine.session() as whole:
            whole.prefill(ids)
            want = bits(whole)
            kept, walked = states(whole, engine), walk(whole, 8)
        for ends in ([64], [960], [64, 128, 192, 640], [512, 576]):
            with engine.session() as session, engine.session() as other:
                for begin, end in zip([0, *ends], [*ends, len(ids)], strict=True):
                    other.prefill(ids_of(begin + 1))  # and somebody else in between
                    session.prefill(ids[begin:end])
                assert bits(session) == want, ends
                for name, state in states(session, engine).items():
                    assert torch.equal(state, kept[name]), (ends, name)
                assert walk(session, 8) == walked


def test_other_pieces_give_nearly_the_same() -> None:
    ids = long_ids()[:600]
    with (
        open_engine(max_context=700, max_sessions=2) as engine,
        engine.session() as whole,
        engine.session() as pieces,
    ):
        whole.prefill(ids)
        for begin, end in ((0, 70), (70, 71), (71, 300), (300, 600)):
            pieces.prefill(ids[begin:end])
        assert_close(pieces.logits[None], whole.logits[None])


def test_a_prompt_beside_replies_gives_the_bits_it_gives_alone() -> None:
    """Its steps are then smaller, and between those of the others."""
    ids = long_ids()[:3000]
    with open_engine(max_context=4096, max_sessions=9, poison=True) as engine:
        alone = engine.generate([ids], greedy(8))[0]
        replies = [engine.generate([ids_of(row)], greedy(60))[0] for row in range(8)]
        prompts = [*(ids_of(row) for row in range(8)), ids]
        settings = [*(greedy(60) for _ in range(8)), greedy(8)]
        assert engine.generate(prompts, settings) == [*replies, alone]
        assert engine.stats["max_decode_rows"] >= 8


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_prompt_of_128k_tokens(tmp_path: Path) -> None:
    config = bench.PRESETS["small"] | {"num_hidden_layers": 4, "max_position_embeddings": 2**18}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = [(7 * i * i + i) % 32000 for i in range(2**17)]
    settings = {"path": tmp_path, "load_format": "dummy", "max_context": 2**17 + 64}
    with open_engine(**settings, max_sessions=1) as engine:
        before = engine.memory
        with engine.session() as session:
            session.prefill(ids)
            want = bits(session)
            walked = walk(session, 4)
        with engine.session() as session:
            session.prefill(ids[:70_016])
            session.prefill(ids[70_016:])
            assert bits(session) == want
            assert walk(session, 4) == walked
        assert engine.memory == before, "a prompt took memory"
