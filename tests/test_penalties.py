"""Penalties against their definition, by the logits that the engine itself gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qwen_moe
from qwen_moe import SamplingParams

PROMPT = "The king said to the king, and the king said"


@pytest.fixture(scope="module")
def engine() -> Iterator[qwen_moe.Engine]:
    with qwen_moe.Engine(device="cpu", max_sessions=1, max_context=256) as engine:
        yield engine


def drawn(engine: qwen_moe.Engine, params: SamplingParams) -> list[tuple[int, torch.Tensor]]:
    """(token, logits it was drawn from) of a reply to PROMPT."""
    with engine.session() as session:
        session.prefill(PROMPT)
        return [(session.decode(params).token_id, session.logits) for _ in range(12)]


def test_presence_and_frequency_count_the_reply_and_not_the_prompt(
    engine: qwen_moe.Engine,
) -> None:
    presence, frequency = 0.7, 1.3
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency, ignore_eos=True)
    reply: list[int] = []
    changed = 0
    for token, logits in drawn(engine, params):
        want = logits.clone()
        for seen in set(reply):
            want[seen] -= presence + frequency * reply.count(seen)
        assert token == int(want.argmax())
        changed += token != int(logits.argmax())
        reply.append(token)
    assert changed > 0, "the penalties made no difference"


def test_repetition_counts_prompt_and_reply(engine: qwen_moe.Engine) -> None:
    factor = 1.5
    timeline = engine.tokenizer.encode(PROMPT)
    changed = 0
    params = SamplingParams(repetition_penalty=factor, ignore_eos=True)
    for token, logits in drawn(engine, params):
        want = logits.clone()
        for seen in set(timeline):
            want[seen] = want[seen] / factor if want[seen] > 0 else want[seen] * factor
        assert token == int(want.argmax())
        changed += token != int(logits.argmax())
        timeline.append(token)
    assert changed > 0, "the penalty made no difference"
