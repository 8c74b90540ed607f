"""`qwen-moe bench` on a GPU: decode by batch, with and without graphs, beside a plain read.

One pool of sessions is prefilled once, and every run lets the first of them decode on from where
they are. Contexts grow a little on the way; their range is reported.
"""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qwen_moe import _core, bench_prompts
from qwen_moe.engine import Engine
from qwen_moe.sampling import SamplingParams

GREEDY = SamplingParams()
MAX_ROWS = 64  # of a decode step


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        batches: Sessions together.
        prompt_tokens: Of every session's prompt.
        decode_tokens: Of every session in a run.
        repeat: Timed runs of everything, after one that is not.
        long_context: Tokens before another run of one session; 0 leaves it out.
        prompts: Lengths of prompts to time.
    """

    batches: Sequence[int]
    prompt_tokens: int
    decode_tokens: int
    repeat: int
    long_context: int = 0
    prompts: Sequence[int] = ()

    @property
    def sessions(self) -> int:
        """Of the pool; two of them take turns."""
        return max(2, *self.batches)

    @property
    def context(self) -> int:
        """Tokens that the session in every run ends with."""
        kinds = len(self.batches) + 2  # one session token by token, and two in turn
        return self.prompt_tokens + 1 + kinds * (self.repeat + 1) * self.decode_tokens


@dataclass(slots=True)
class Timing:
    """Runs of one kind.

    Attributes:
        batch: Sessions together.
        ms: Milliseconds of a step, for every timed run.
        context: Tokens of the shortest session at the first step, and of the longest at the last.
        tokens: What was drawn, for every run and session.
    """

    batch: int
    ms: list[float] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)

    def add(self, ms: float, context: list[int], tokens: list[list[int]], *, timed: bool) -> None:
        """One more run."""
        if timed:
            self.ms.append(ms)
            low, high = self.context or context
            self.context = [min(low, context[0]), max(high, context[1])]
        self.tokens += tokens

    def report(self) -> dict[str, Any]:
        """For the JSON file."""
        ms = statistics.median(self.ms)
        return {
            "batch": self.batch,
            "ms_per_step": ms,
            "ms_per_step_of_runs": self.ms,
            "decode_tokens_per_second": 1000 * self.batch / ms,
            "context": self.context,
            "tokens_sha256": hashlib.sha256(json.dumps(self.tokens).encode()).hexdigest(),
        }


def measure(
    engine: Engine, plan: Plan, weight_bytes: int, another: Callable[..., Engine]
) -> dict[str, Any]:
    """All figures of a GPU.

    Args:
        engine: With `plan.sessions` sessions of `plan.context` tokens, all closed.
        plan: What to measure.
        weight_bytes: Bytes of weights that one token reads.
        another: Opens one more engine on the same weights, with other settings.
    """
    index = int(engine.devices[0].partition(":")[2] or 0)
    reads = [_core.cuda_read_bandwidth(index)]
    opening = _opening(engine)
    began = time.perf_counter()
    pool = [open_session(engine, row, plan.prompt_tokens) for row in range(plan.sessions)]
    prefill = time.perf_counter() - began

    batches = [Timing(batch) for batch in plan.batches]
    single, alternating = Timing(1), Timing(1)
    for turn in range(plan.repeat + 1):
        for timing in batches:
            decode(engine, pool[: timing.batch], plan.decode_tokens, timing, timed=turn > 0)
        take_turns(engine, pool[:1], plan.decode_tokens, single, timed=turn > 0)
        take_turns(engine, pool[:2], plan.decode_tokens, alternating, timed=turn > 0)
        reads.append(_core.cuda_read_bandwidth(index))
    read = statistics.median(reads)
    stats = engine.stats

    plain = Timing(1)
    with another(max_sessions=1, max_context=plan.context, cuda_graph=False) as launched:
        session = open_session(launched, 0, plan.prompt_tokens)
        for turn in range(plan.repeat + 1):
            decode(launched, [session], plan.decode_tokens, plain, timed=turn > 0)
        ours, theirs = launched.core.tokens(session), engine.core.tokens(pool[0])
    shorter = min(len(ours), len(theirs))

    figures: dict[str, Any] = {
        "gpu": _core.cuda_device_info(index),
        "read_bandwidth": read,
        "read_bandwidths": reads,
        "weight_bytes_per_token": weight_bytes,
        "prefill_tokens_per_second": plan.sessions * plan.prompt_tokens / prefill,
        "results": [timing.report() for timing in batches],
        "token_by_token": single.report(),
        "alternating": alternating.report(),
        "without_graph": plain.report() | {"same_tokens": ours[:shorter] == theirs[:shorter]},
        "stats": stats,
        "memory": engine.memory,
        "session_bytes": list(_core.session_bytes(engine.config, engine.kv_dtype)),
        "ms_to_open_session": opening,
        "plan": asdict(plan),
    }
    for result in figures["results"]:
        if result["batch"] == 1:
            result |= _floor(engine, weight_bytes, read, result)
    for session in pool:
        engine.core.close(session)
    if plan.long_context:
        figures["long_context"] = _long(plan, weight_bytes, read, another)
    if plan.prompts:
        figures["prompts"] = bench_prompts.measure(plan.prompts, plan.repeat, another)
    return figures


def _opening(engine: Engine) -> float:
    """Milliseconds until a session is open and its state is cleared."""
    core, times = engine.core, []
    for _ in range(20):
        began = time.perf_counter()
        session = core.open()
        times.append(1000 * (time.perf_counter() - began))
        core.close(session)
    return statistics.median(times)


def _long(
    plan: Plan, weight_bytes: int, read: float, another: Callable[..., Engine]
) -> dict[str, Any]:
    timing = Timing(1)
    context = plan.long_context + 1 + (plan.repeat + 1) * plan.decode_tokens
    with another(max_sessions=1, max_context=context) as engine:
        session = open_session(engine, 0, plan.long_context)
        for turn in range(plan.repeat + 1):
            decode(engine, [session], plan.decode_tokens, timing, timed=turn > 0)
        result = timing.report()
        return result | _floor(engine, weight_bytes, read, result)


def _floor(
    engine: Engine, weight_bytes: int, read: float, result: dict[str, Any]
) -> dict[str, Any]:
    """What one session must move in a step at least, and how near the step comes to that.

    Recurrent and conv state are read and written, keys and values of the context read. For more
    than one session it is not known which experts they share.
    """
    fixed, per_token = _core.session_bytes(engine.config, engine.kv_dtype)
    state = 2 * fixed + per_token * statistics.mean(result["context"])
    floor = 1000 * (weight_bytes + state) / read
    return {
        "state_bytes_per_step": round(state),
        "floor_ms": floor,
        "share_of_floor": floor / result["ms_per_step"],
    }


def open_session(engine: Engine, row: int, prompt_tokens: int) -> int:
    """A session with a prompt of its own behind it and one token drawn.

    That token was waited for, and so was the prompt.
    """
    core = engine.core
    session = core.open()
    prompt = random.Random(row).choices(range(engine.config.vocab_size), k=prompt_tokens)
    core.submit(session, prompt, sampling=GREEDY.to_core(), max_tokens=1, ignore_eos=True)
    core.run([session])
    core.poll(session)
    return session


def decode(
    engine: Engine, sessions: Sequence[int], tokens: int, into: Timing, *, timed: bool
) -> None:
    """Let the sessions draw `tokens` tokens each, together: as many steps as tokens.

    Every one of them has a drawn token that waits to be fed, so that no step is a prefill.
    """
    core = engine.core
    low = min(core.position(session) for session in sessions)
    steps = core.stats["decode_steps"]
    sampling = GREEDY.to_core()
    for session in sessions:
        core.submit(session, [], sampling=sampling, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    core.run(sessions)
    ms = 1000 * (time.perf_counter() - began) / tokens
    drawn = [core.poll(session).token_ids for session in sessions]
    steps = core.stats["decode_steps"] - steps
    if steps != tokens:
        raise AssertionError(f"{tokens} tokens took {steps} steps; the figures would be wrong")
    high = max(core.position(session) for session in sessions)
    into.add(ms, [low, high], drawn, timed=timed)


def take_turns(
    engine: Engine, sessions: Sequence[int], tokens: int, into: Timing, *, timed: bool
) -> None:
    """Let the sessions draw one token each in turn, `tokens` in all; a step has one row."""
    core = engine.core
    low = min(core.position(session) for session in sessions)
    drawn: list[list[int]] = [[] for _ in sessions]
    sampling = GREEDY.to_core()
    began = time.perf_counter()
    for index in range(tokens):
        session = sessions[index % len(sessions)]
        core.submit(session, [], sampling=sampling, max_tokens=1, ignore_eos=True)
        core.run([session])
        drawn[index % len(sessions)] += core.poll(session).token_ids
    ms = 1000 * (time.perf_counter() - began) / tokens
    high = max(core.position(session) for session in sessions)
    into.add(ms, [low, high], drawn, timed=timed)


def recipe_of(report: dict[str, Any]) -> str:
    """How the weights of a report were packed."""
    group = f" in groups of {report['group']}" if report["group"] else ""
    return f"quantize {report['quantize']}{group}"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    gpu = report["gpu"]
    lines = [
        f"{gpu.get('name', 'GPU')} | {report['device']} | {report['machine']['cpu']}",
        f"{report['model']} | {recipe_of(report)} | prompt {report['prompt_tokens']} | "
        f"decode {report['decode_tokens']} | median of {report['repeat']}",
        f"plain read {report['read_bandwidth'] / 1e9:.0f} GB/s | a token reads "
        f"{report['weight_bytes_per_token'] / 1e6:.1f} MB of weights | prefill "
        f"{report['prefill_tokens_per_second']:.0f} tok/s, one prompt after the other",
        f"{'batch':>5} {'ms/step':>9} {'tok/s':>9} {'of first':>9} {'context':>13}  tokens",
    ]
    rows = report["results"]
    first = rows[0]["decode_tokens_per_second"]
    for row in rows:
        context = "{}-{}".format(*row["context"])
        lines.append(
            f"{row['batch']:>5} {row['ms_per_step']:>9.3f} "
            f"{row['decode_tokens_per_second']:>9.1f} "
            f"{row['decode_tokens_per_second'] / first:>8.2f}x {context:>13}  "
            f"{row['tokens_sha256'][:16]}"
        )
    single, alternating = report["token_by_token"], report["alternating"]
    lines.append(
        f"one token a request: {single['ms_per_step']:.3f} ms for one session, "
        f"{alternating['ms_per_step']:.3f} ms for two in turn"
    )
    plain = report["without_graph"]
    same = "the same tokens" if plain["same_tokens"] else "OTHER TOKENS"
    lines.append(f"batch 1 without graphs: {plain['ms_per_step']:.3f} ms, {same}")
    if "long_context" in report:
        row = report["long_context"]
        lines.append(
            f"batch 1 at {row['context'][0]}-{row['context'][1]} tokens: "
            f"{row['ms_per_step']:.3f} ms, {row['share_of_floor']:.0%} of its byte floor"
        )
    for row in rows:
        if "floor_ms" in row:
            lines.append(
                f"batch 1 moves {report['weight_bytes_per_token'] / 1e6:.1f} MB of weights and "
                f"{row['state_bytes_per_step'] / 1e6:.1f} MB of state: {row['floor_ms']:.3f} ms at "
                f"a plain read's speed, {row['share_of_floor']:.0%} of it reached"
            )
    memory, (fixed, per_token) = report["memory"], report["session_bytes"]
    lines.append(
        f"memory: weights {memory['weights'] / 2**30:.2f} GiB, scratch "
        f"{memory['scratch'] / 2**30:.2f} GiB, graphs {memory.get('graphs', 0) / 2**20:.0f} MiB, "
        f"captured in {report['stats'].get('graph_capture_us', 0) / 1000:.0f} ms; a session "
        f"{fixed / 1e6:.1f} MB and {per_token / 1024:.1f} KiB a token, open in "
        f"{report['ms_to_open_session']:.3f} ms"
    )
    if "prompts" in report:
        lines += bench_prompts.table(report["prompts"])
    return "\n".join(lines)
