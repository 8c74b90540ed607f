"""Random interleavings of everything a session can do, each session against itself alone.

The machine drives the core: several sessions in one run, so that steps are shared. For every
session it keeps the calls that made it, and in the end plays them to a fresh engine that holds
nothing else. Tokens, log probabilities and logits must be the same bit for bit.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import oracle
import qwen_moe
from qwen_moe import _core

VOCAB = 97
MAX_CONTEXT = 320
MAX_SESSIONS = 4
PROMPT = oracle.prompt(400, vocab=VOCAB)

CONFIG = oracle.text_config(
    vocab_size=VOCAB,
    hidden_size=64,
    layer_types=["linear_attention", "full_attention"],
    num_attention_heads=2,
    num_key_value_heads=1,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    num_experts=4,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)

GREEDY: dict = {}
SAMPLINGS: list[dict] = [
    GREEDY,
    {"temperature": 0.9, "seed": 1, "logprobs": 2},
    {"temperature": 1.3, "seed": 2, "top_k": 20, "top_p": 0.95, "logprobs": 0},
    {"temperature": 0.7, "seed": 3, "min_p": 0.02, "repetition_penalty": 1.5},
    {"temperature": 1.0, "seed": 4, "presence_penalty": 2.0, "frequency_penalty": 1.0},
]


@dataclass(frozen=True)
class Call:
    """One submit: a piece of PROMPT, then `draws` tokens by SAMPLINGS[sampling]."""

    start: int
    length: int
    draws: int
    sampling: int

    @property
    def tokens(self) -> list[int]:
        return PROMPT[self.start : self.start + self.length]

    def submit(self, engine: _core.Engine, session: int) -> None:
        sampling = _core.Sampling(**SAMPLINGS[self.sampling]) if self.draws else None
        engine.submit(session, self.tokens, sampling=sampling, max_tokens=self.draws)


@dataclass(frozen=True)
class Outcome:
    """What a call gave, to the last bit."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    logits: bytes

    @classmethod
    def of(cls, engine: _core.Engine, session: int) -> Outcome:
        progress = engine.poll(session)
        assert progress.finished
        assert progress.error == ""
        return cls(
            tuple(progress.token_ids),
            tuple(progress.logprobs),
            tuple(tuple(top) for top in progress.top_logprobs),
            oracle.core_logits(engine, session, VOCAB),
        )


@dataclass
class Timeline:
    """The calls that made a session, and what they gave."""

    calls: list[Call] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [
            token
            for call, outcome in zip(self.calls, self.outcomes, strict=True)
            for token in [*call.tokens, *outcome.tokens]
        ]

    def add(self, call: Call, outcome: Outcome) -> None:
        self.calls.append(call)
        self.outcomes.append(outcome)

    def copy(self) -> Timeline:
        return Timeline(list(self.calls), list(self.outcomes))


@functools.cache
def weights(recipe: str, split: tuple[int, ...]) -> _core.Model:
    model = oracle.random_model(CONFIG, seed=1)
    devices = ("cpu",) * (len(split) + 1)
    return oracle.core_model(model, recipe=recipe, devices=devices, split=split)


def open_engine(model: _core.Model, *, sessions: int) -> _core.Engine:
    # Freed state turns to NaN: whatever leaks makes logits that are not finite.
    return oracle.core_engine(
        model, max_sessions=sessions, max_context=MAX_CONTEXT, kv_dtype="bfloat16", poison=True
    )


def play_alone(model: _core.Model, calls: Sequence[Call]) -> list[Outcome]:
    engine = open_engine(model, sessions=1)
    session = engine.open()
    outcomes = []
    for call in calls:
        call.submit(engine, session)
        engine.run([session])
        outcomes.append(Outcome.of(engine, session))
    return outcomes


CALLS = st.builds(
    Call,
    start=st.integers(0, 200),
    length=st.sampled_from([0, 0, 0, 1, 2, 7, 63, 64, 65, 100]),
    draws=st.integers(0, 6),
    sampling=st.integers(0, len(SAMPLINGS) - 1),
)
PICK = st.integers(0, MAX_SESSIONS - 1)


class SessionMachine(RuleBasedStateMachine):
    recipe = "none"
    split: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        gc.collect(1)  # engines of a failed example hang in its traceback, many of them do not fit
        self.model = weights(self.recipe, self.split)
        self.engine = open_engine(self.model, sessions=MAX_SESSIONS)
        self.sessions: dict[int, Timeline] = {}
        self.saved: list[tuple[list, Timeline]] = []
        self.given: set[int] = set()

    def teardown(self) -> None:
        del self.engine  # its memory at once, also where a failure keeps the machine alive
        for timeline in self.sessions.values():
            self.assert_as_alone(timeline)

    def assert_as_alone(self, timeline: Timeline) -> None:
        alone = play_alone(self.model, timeline.calls)
        for call, got, want in zip(timeline.calls, timeline.outcomes, alone, strict=True):
            assert got == want, f"{call} gave something else than alone, after {timeline.calls}"

    def pick(self, index: int) -> int:
        return list(self.sessions)[index % len(self.sessions)]

    def fits(self, session: int, call: Call) -> bool:
        position = len(self.sessions[session].tokens)
        empty = call.length == 0 and (call.draws == 0 or position == 0)
        return not empty and position + call.length + call.draws <= MAX_CONTEXT

    def added(self, session: int, timeline: Timeline) -> None:
        assert session not in self.given, "a session id was given out twice"
        self.given.add(session)
        self.sessions[session] = timeline

    @initialize()
    def begin(self) -> None:
        self.open()

    @rule()
    def open(self) -> None:
        if len(self.sessions) < MAX_SESSIONS:
            self.added(self.engine.open(), Timeline())
        else:
            with pytest.raises(qwen_moe.CapacityError, match=str(MAX_SESSIONS)):
                self.engine.open()

    @rule(work=st.lists(st.tuples(PICK, CALLS), min_size=1, max_size=MAX_SESSIONS))
    def run_together(self, work: list[tuple[int, Call]]) -> None:
        self.run({self.pick(index): call for index, call in work})

    def run(self, work: dict[int, Call]) -> None:
        work = {session: call for session, call in work.items() if self.fits(session, call)}
        for session, call in work.items():
            call.submit(self.engine, session)
        self.engine.run(list(work))
        for session, call in work.items():
            outcome = Outcome.of(self.engine, session)
            assert len(outcome.tokens) == call.draws
            self.sessions[session].add(call, outcome)

    @rule(index=PICK, call=CALLS, other=PICK, besides=CALLS, least=st.integers(1, 4))
    def cancel_midway(self, index: int, call: Call, other: int, besides: Call, least: int) -> None:
        """A request that is dropped counts as one for the tokens that came until then."""
        session, second = self.pick(index), self.pick(other)
        call = Call(call.start, call.length, 12, call.sampling)
        if not self.fits(session, call):
            return
        call.submit(self.engine, session)
        company = second != session and self.fits(second, besides)
        if company:
            besides.submit(self.engine, second)
        self.engine.run([session], tokens=least)
        self.engine.cancel(session)
        outcome = Outcome.of(self.engine, session)
        assert least <= len(outcome.tokens) <= 12
        made = Call(call.start, call.length, len(outcome.tokens), call.sampling)
        self.sessions[session].add(made, outcome)
        if company:
            self.engine.run([second])
            self.sessions[second].add(besides, Outcome.of(self.engine, second))

    @rule(index=PICK)
    def fork(self, index: int) -> None:
        session = self.pick(index)
        if len(self.sessions) < MAX_SESSIONS:
            self.added(self.engine.fork(session), self.sessions[session].copy())
        else:
            with pytest.raises(qwen_moe.CapacityError, match=str(MAX_SESSIONS)):
                self.engine.fork(session)

    @rule(index=PICK)
    def save(self, index: int) -> None:
        session = self.pick(index)
        if self.sessions[session].calls:
            state = self.engine.export_state(session)
            self.saved.append((state, self.sessions[session].copy()))

    @rule(index=st.integers(0, 10))
    def load(self, index: int) -> None:
        if not self.saved or len(self.sessions) == MAX_SESSIONS:
            return
        state, timeline = self.saved[index % len(self.saved)]
        session = self.engine.open()
        self.engine.import_state(session, state)
        self.added(session, timeline.copy())
        assert self.engine.export_state(session) == state

    @rule(index=PICK)
    def reset(self, index: int) -> None:
        session = self.pick(index)
        self.assert_as_alone(self.sessions[session])
        self.engine.reset(session)
        self.sessions[session] = Timeline()

    @rule(index=PICK)
    def close(self, index: int) -> None:
        session = self.pick(index)
        self.assert_as_alone(self.sessions.pop(session))
        self.engine.close(session)
        with pytest.raises(qwen_moe.InvalidArgument):
            self.engine.position(session)
        if not self.sessions:
            self.open()

    @rule(index=PICK, bad=st.sampled_from(["id", "negative", "context"]))
    def refused_submit_changes_nothing(self, index: int, bad: str) -> None:
        tokens = {"id": [1, VOCAB], "negative": [-1], "context": [1] * (MAX_CONTEXT + 1)}[bad]
        error = qwen_moe.CapacityError if bad == "context" else qwen_moe.InvalidArgument
        with pytest.raises(error):
            self.engine.submit(self.pick(index), tokens, sampling=None, max_tokens=0)

    @invariant()
    def timelines_are_kept(self) -> None:
        assert self.engine.stats["sessions_open"] == len(self.sessions)
        for session, timeline in self.sessions.items():
            assert self.engine.tokens(session) == timeline.tokens
            assert self.engine.position(session) == len(timeline.tokens)
            assert self.engine.poisoned(session) == ""


class Int4Machine(SessionMachine):
    recipe = "int4"


class TwoShardMachine(SessionMachine):
    split = (1,)


TestSessions = SessionMachine.TestCase
TestSessionsInt4 = Int4Machine.TestCase
TestSessionsOnTwoShards = TwoShardMachine.TestCase

# Shrinking a failure takes minutes; it is left to `--hypothesis-profile search`.
if settings().derandomize:
    for machine in (TestSessions, TestSessionsInt4, TestSessionsOnTwoShards):
        machine.settings = settings(
            phases=[Phase.generate], max_examples=250, stateful_step_count=30
        )
    del machine  # else it is collected as one more test


@pytest.mark.parametrize("way", ["fork", "save"])
@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_a_copy_amid_a_reply_goes_on_like_the_reply(sampling: int, way: str) -> None:
    """Penalties count the reply so far, and the draw depends on the position."""
    model = weights("none", ())
    first, rest = Call(0, 65, 30, sampling), Call(0, 0, 20, sampling)
    want = play_alone(model, [first, rest])
    engine = open_engine(model, sessions=2)
    session = engine.open()
    first.submit(engine, session)
    engine.run([session])
    assert Outcome.of(engine, session) == want[0]
    if way == "fork":
        copy = engine.fork(session)
    else:
        copy = engine.open()
        engine.import_state(copy, engine.export_state(session))
    for each in (copy, session):
        rest.submit(engine, each)
        engine.run([each])
        assert Outcome.of(engine, each) == want[1]


def test_the_machine_would_notice_a_difference() -> None:
    """Guards the comparison: another piece length, sampling or earlier token must show."""
    model = weights("none", ())
    base = [Call(0, 65, 3, 1), Call(0, 0, 2, 0)]
    want = play_alone(model, base)
    assert play_alone(model, base) == want
    for other in (
        [Call(1, 65, 3, 1), base[1]],
        [Call(0, 65, 3, 2), base[1]],
        [Call(0, 64, 3, 1), base[1]],
    ):
        assert play_alone(model, other) != want
