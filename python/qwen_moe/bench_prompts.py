"""Prompts on a GPU: how fast they go in, and how long sessions that decode wait for them."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen_moe.engine import Engine
from qwen_moe.sampling import SamplingParams

GREEDY = SamplingParams()
BESIDE = 8  # sessions that decode while the longest prompt goes in


def measure(
    lengths: Sequence[int], repeat: int, another: Callable[..., Engine], *, replies: int = 64
) -> dict[str, Any]:
    """Time to the first token by length of the prompt, and gaps in replies beside the longest.

    Args:
        lengths: Tokens of the prompts.
        repeat: Timed prompts of every length, after one that is not.
        another: Opens an engine with the settings given.
        replies: Tokens that a session which decodes has room for, for each 1024 of the prompt.
    """
    longest = max(lengths)
    room = 64 + replies * (1 + longest // 1024)
    with another(max_sessions=BESIDE + 1, max_context=longest + room) as engine:
        return {
            "prompts": [_prompt(engine, length, repeat) for length in lengths],
            "beside": _beside(engine, longest, room - 32),
            "memory": engine.memory,
        }


def _tokens(engine: Engine, count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(engine.config.vocab_size), k=count)


def _prompt(engine: Engine, length: int, repeat: int) -> dict[str, Any]:
    core, times, drawn = engine.core, [], []
    for turn in range(repeat + 1):
        session, prompt = core.open(), _tokens(engine, length, length + turn)
        began = time.perf_counter()
        core.submit(session, prompt, sampling=GREEDY.to_core(), max_tokens=1, ignore_eos=True)
        core.run([session])
        if turn:
            times.append(1000 * (time.perf_counter() - began))
        drawn.append(core.poll(session).token_ids)
        core.close(session)
    ms = statistics.median(times)
    return {
        "tokens": length,
        "ms_to_first_token": ms,
        "ms_of_runs": times,
        "tokens_per_second": 1000 * length / ms,
        "tokens_sha256": hashlib.sha256(json.dumps(drawn).encode()).hexdigest(),
    }


def _beside(engine: Engine, length: int, most: int) -> dict[str, Any]:
    """Sessions draw token after token, alone and then while a long prompt goes in."""
    core = engine.core
    sessions = [core.open() for _ in range(BESIDE)]
    for row, session in enumerate(sessions):
        prompt = _tokens(engine, 32, row)
        core.submit(session, prompt, sampling=GREEDY.to_core(), max_tokens=most, ignore_eos=True)

    def gap() -> float:
        began = time.perf_counter()
        core.run(sessions, tokens=1)
        for session in sessions:
            core.poll(session)
        return 1000 * (time.perf_counter() - began)

    alone = [gap() for _ in range(16)][8:]
    late = core.open()
    sampling = GREEDY.to_core()
    began = time.perf_counter()
    core.submit(late, _tokens(engine, length, 0), sampling=sampling, max_tokens=1, ignore_eos=True)
    gaps: list[float] = []
    while len(gaps) + 24 < most and not core.poll(late).finished:
        gaps.append(gap())
    seconds = time.perf_counter() - began
    for session in [late, *sessions]:
        core.close(session)
    return {
        "sessions": BESIDE,
        "prompt_tokens": length,
        "prompt_tokens_per_second": length / seconds,
        "gap_ms_alone": statistics.median(alone),
        "gap_ms_median": statistics.median(gaps),
        "gap_ms_most": max(gaps),
        "gaps_ms": gaps,
    }


def table(figures: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"{'prompt':>7} {'first token':>12} {'tok/s':>9}"]
    lines += [
        f"{row['tokens']:>7} {row['ms_to_first_token']:>9.1f} ms {row['tokens_per_second']:>9.0f}"
        for row in figures["prompts"]
    ]
    row = figures["beside"]
    lines.append(
        f"{row['sessions']} sessions draw a token every {row['gap_ms_alone']:.1f} ms, beside a "
        f"prompt of {row['prompt_tokens']} tokens every {row['gap_ms_median']:.1f} ms, at most "
        f"{row['gap_ms_most']:.1f} ms; the prompt goes in at "
        f"{row['prompt_tokens_per_second']:.0f} tok/s"
    )
    return lines
