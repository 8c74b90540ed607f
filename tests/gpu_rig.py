"""What the tests on a GPU share: engines, prompts, and how close is close."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

import qwen_moe

DEVICE = "cuda:0"
RECIPES = [None, "int8", "int4", "int4-all"]
# Activations in fp16, or bf16 in prompts. benchmarks/README.md, "Logits beside the CPU's", has the
# figures: rounding moves every position a little, and some, where two experts are level, much more.
MEDIAN_L2, MOST_L2 = 2e-2, 4e-2
MEDIAN_KL, MOST_KL = 2e-3, 5e-3  # nats
STEP = qwen_moe.SamplingParams(ignore_eos=True)  # greedy
TEXT = """The old man went down to the sea in the morning, and the wind was in the west. He had a
small boat, and in it there was bread and water for three days. "Where are you going?" said the
boy. "I am going to the island," said he, "for there is a house upon it, and in the house there is
a light." And the boy stood and looked after him until he could see the boat no more. """


def open_engine(**settings) -> qwen_moe.Engine:
    defaults = {"device": DEVICE, "max_sessions": 2, "max_context": 256, "quantize": "int4"}
    return qwen_moe.Engine(**(defaults | settings))


@functools.cache
def text_ids() -> list[int]:
    tokenizer = qwen_moe.Tokenizer(Path(qwen_moe.__file__).parent / "models" / "tiny")
    return list(tokenizer.encode(TEXT))


def ids_of(row: int, length: int | None = None) -> list[int]:
    """A prompt of its own for every row: 1 to 70 tokens, around the edges of a page too."""
    ids = text_ids()
    start = 7 * row % (len(ids) - 75)
    length = length or (1, 63, 64, 65, 40, 17, 70, 5)[row % 8]
    return [(row * 31 + 5) % 128, *ids[start : start + length - 1]]


def greedy(tokens: int, logprobs: int | None = 5) -> qwen_moe.SamplingParams:
    return qwen_moe.SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=logprobs)


def seeded(row: int, tokens: int = 16) -> qwen_moe.SamplingParams:
    return qwen_moe.SamplingParams(
        temperature=0.9,
        top_k=(0, 40)[row % 2],
        top_p=(1.0, 0.9, 0.95)[row % 3],
        min_p=(0.0, 0.02)[row // 2 % 2],
        repetition_penalty=(1.0, 1.0, 1.1)[row % 3],
        seed=row,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=3,
    )


def bits(session: qwen_moe.Session) -> bytes:
    logits = session.logits
    assert torch.isfinite(logits).all()
    return logits.numpy().tobytes()


def walk(session: qwen_moe.Session, steps: int) -> list[tuple[int, bytes]]:
    """Greedy tokens, and the bits of the logits that each was drawn from."""
    return [(session.decode(STEP).token_id, bits(session)) for _ in range(steps)]


def distances(got: torch.Tensor, want: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row: the relative L2 error, and KL(want || got) in nats."""
    got, want = got.double(), want.double()
    assert torch.isfinite(got).all()
    p, q = want.log_softmax(-1), got.log_softmax(-1)
    return (got - want).norm(dim=-1) / want.norm(dim=-1), (p.exp() * (p - q)).sum(-1)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    errors, divergences = distances(got, want)
    report = (
        f"relative L2: median {errors.median():.2e}, most {errors.max():.2e}; "
        f"KL: median {divergences.median():.2e}, most {divergences.max():.2e}"
    )
    apart = ((errors > MOST_L2) | (divergences > MOST_KL)).sum()
    assert apart <= len(errors) // 10, f"{apart} positions of {len(errors)} apart: {report}"
    if len(errors) > 1:
        assert errors.median() <= MEDIAN_L2, report
        assert divergences.median() <= MEDIAN_KL, report
