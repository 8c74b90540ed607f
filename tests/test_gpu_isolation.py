"""Sessions on a GPU, each with the bits that it has alone.

Everything that a session gives is compared as bits: logits where it is driven token by token, and
log-probabilities of the likeliest tokens where it is one step ahead of the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import oracle
import qwen_moe
from gpu_rig import DEVICE, RECIPES, bits, greedy, ids_of, open_engine, seeded, walk

pytestmark = pytest.mark.gpu

BUCKETS = [1, 2, 4, 8, 16, 32, 64]  # rows that a captured step has room for

# --- Nothing of another session -------------------------------------------------

COMPANY = [2, 4, 16, 64]
STEPS = 10


@pytest.fixture(scope="module")
def single() -> Iterator[qwen_moe.Engine]:
    """One session, so that every step has one row."""
    with open_engine(max_sessions=1, poison=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone(single: qwen_moe.Engine) -> Callable[[int], list[tuple[int, bytes]]]:
    """What the session of a row walks when there is no other."""

    @functools.cache
    def walked(row: int) -> list[tuple[int, bytes]]:
        with single.session() as session:
            session.prefill(ids_of(row))
            return walk(session, STEPS)

    return walked


@pytest.fixture(params=COMPANY)
def count(request: pytest.FixtureRequest) -> int:
    """Sessions that live at the same time."""
    return request.param


@pytest.fixture
def crowd(count: int) -> Iterator[qwen_moe.Engine]:
    """Room for them, and for one that passes by."""
    with open_engine(max_sessions=count + 1, poison=True) as engine:
        yield engine


def test_sessions_that_decode_in_turn_are_each_as_alone(
    crowd: qwen_moe.Engine, count: int, alone
) -> None:
    sessions = [crowd.session() for _ in range(count)]
    for row, session in enumerate(sessions):
        session.prefill(ids_of(row))
    walks: list[list] = [[] for _ in sessions]
    for _ in range(STEPS):
        for row, session in enumerate(sessions):
            walks[row] += walk(session, 1)
    for row, session in enumerate(sessions):
        assert walks[row] == alone(row), f"row {row}"
        session.close()


def test_prompts_in_one_batch_are_each_as_alone(
    crowd: qwen_moe.Engine, count: int, single: qwen_moe.Engine
) -> None:
    prompts = [ids_of(row) for row in range(count)]
    together = crowd.generate(prompts, greedy(40))
    for row, prompt in enumerate(prompts):
        assert together[row] == single.generate([prompt], greedy(40))[0], f"row {row}"
    backward = crowd.generate(prompts[::-1], greedy(40))
    assert backward == together[::-1]
    assert crowd.stats["max_decode_rows"] >= min(count, 16), "the batch never shared a step"


def test_prefills_between_decodes_change_nothing(crowd: qwen_moe.Engine, count: int, alone) -> None:
    """Half of the sessions decode while the others come in one by one, and long prompts go by."""
    early = [crowd.session() for _ in range(count // 2)]
    for row, session in enumerate(early):
        session.prefill(ids_of(row))
    walks: list[list] = [[] for _ in range(count)]
    late = []
    for step in range(STEPS):
        while len(late) * STEPS < step * (count // 2):
            late.append(crowd.session())
            late[-1].prefill(ids_of(len(early) + len(late) - 1))
        with crowd.session() as passing:
            passing.prefill(ids_of(step, 70))
            for row, session in enumerate(early):
                walks[row] += walk(session, 1)
    for row, session in enumerate(late, len(early)):
        walks[row] = walk(session, STEPS)
    for row in range(len(early) + len(late)):
        assert walks[row] == alone(row), f"row {row}"
    for session in early + late:
        session.close()


def test_slots_that_are_closed_and_opened_again_remember_nothing(
    crowd: qwen_moe.Engine, count: int, alone
) -> None:
    sessions = {}
    for row in range(count):
        sessions[row] = crowd.session()
        sessions[row].prefill(ids_of(row))
    walks: dict[int, list] = {row: [] for row in sessions}
    for step in range(STEPS):
        gone = list(sessions)[step % len(sessions)]
        sessions.pop(gone).close()
        del walks[gone]
        row = count + step
        sessions[row] = crowd.session()
        sessions[row].prefill(ids_of(row))
        walks[row] = []
        for row, session in sessions.items():
            walks[row] += walk(session, 1)
    for row, session in sessions.items():
        assert walks[row] == alone(row)[: len(walks[row])], f"row {row}"
        session.close()
    assert crowd.stats["pages_used"] == 0


def test_a_running_request_survives_every_verb_on_others(single: qwen_moe.Engine) -> None:
    """The steps of a batch are in flight while its neighbours come, fork, reset and go."""
    engine = open_engine(max_sessions=3, poison=True)
    core = engine.core
    (want,) = single.generate([ids_of(3)], greedy(120))
    session = core.open()
    core.submit(session, ids_of(3), sampling=greedy(120).to_core(), max_tokens=120, ignore_eos=True)
    tokens: list[int] = []
    logprobs: list[float] = []
    turn = 0
    while True:
        core.run([session], tokens=5)
        progress = core.poll(session)
        assert progress.error == ""
        tokens += progress.token_ids
        logprobs += progress.logprobs
        if progress.finished:
            break
        other = core.open()
        core.submit(
            other, ids_of(turn), sampling=seeded(turn).to_core(), max_tokens=90, ignore_eos=True
        )
        core.run([other], tokens=1 + turn % 3)
        if turn % 3 == 0:
            core.reset(other)
        elif turn % 3 == 1:
            core.cancel(other)
            core.close(core.fork(other))
        core.close(other)
        turn += 1
    engine.close()
    assert turn > 10
    assert (tokens, logprobs) == (want.token_ids, want.logprobs)


# --- Buckets and graphs ---------------------------------------------------------

ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64]


def together(engine: qwen_moe.Engine, rows: int, tokens: int) -> list[tuple]:
    """Tokens, log-probabilities and last logits of sessions whose every decode step is shared."""
    core = engine.core
    sessions = [core.open() for _ in range(rows)]
    for row, session in enumerate(sessions):
        core.submit(session, ids_of(row), sampling=None, max_tokens=0)
    core.run(sessions)
    for session in sessions:
        core.poll(session)
        core.submit(
            session, [], sampling=greedy(tokens).to_core(), max_tokens=tokens, ignore_eos=True
        )
    before = engine.stats
    core.run(sessions)
    steps = engine.stats["decode_steps"] - before["decode_steps"]
    assert steps == tokens - 1, "the first draw needs no step, and then all go together"
    out = []
    for session in sessions:
        progress = core.poll(session)
        assert progress.error == ""
        logits = oracle.core_logits(core, session, engine.config.vocab_size)
        out.append((progress.token_ids, progress.logprobs, progress.top_logprobs, logits))
        core.close(session)
    return out


@pytest.fixture(scope="module")
def every_row() -> list[tuple]:
    """Each of 64 sessions in steps of its own."""
    with open_engine(max_sessions=1) as engine:
        out = []
        for row in range(64):
            with engine.session() as session:
                session.prefill(ids_of(row))
                steps = list(session.generate(None, greedy(12)))
                out.append(
                    (
                        [step.token_id for step in steps],
                        [step.logprob for step in steps],
                        [list(step.top_logprobs) for step in steps],
                        bits(session),
                    )
                )
        return out


@pytest.mark.parametrize("graph", [True, False], ids=["graphs", "launches"])
def test_every_number_of_rows_gives_the_bits_of_one(every_row: list[tuple], graph: bool) -> None:
    with open_engine(max_sessions=64, poison=True, cuda_graph=graph) as engine:
        for rows in ROWS:
            assert together(engine, rows, 12) == every_row[:rows], f"{rows} rows"
        stats = engine.stats
    if not graph:
        assert stats["graph_captures"] == stats["graph_replays"] == 0
        return
    assert stats["graph_replays"] >= stats["decode_steps"]
    assert stats["graph_captures"] <= 3 * len(BUCKETS), "captured again and again"
    for bucket in BUCKETS:
        assert stats[f"bucket_{bucket}"] > 0, f"the bucket of {bucket} rows was never used"


@pytest.mark.parametrize("quantize", RECIPES, ids=str)
def test_recipes_give_the_same_bits_with_and_without_graphs(quantize: str | None) -> None:
    prompts = [ids_of(row) for row in range(5)]
    runs = []
    for graph in (True, False):
        with open_engine(max_sessions=5, quantize=quantize, cuda_graph=graph) as engine:
            runs.append(engine.generate(prompts, greedy(24)))
            runs.append([engine.generate([prompt], greedy(24))[0] for prompt in prompts])
    assert runs[1:] == runs[:1] * 3


def test_a_thousand_steps_twice_are_the_same() -> None:
    with open_engine(max_context=1100) as engine:
        first = engine.generate([ids_of(0), ids_of(1)], greedy(1000))
        assert [len(reply.token_ids) for reply in first] == [1000, 1000]
        assert engine.generate([ids_of(0), ids_of(1)], greedy(1000)) == first
        assert engine.generate([ids_of(1)], greedy(1000))[0] == first[1]


# --- One step ahead -------------------------------------------------------------


def test_a_reply_that_ends_by_a_stop_token_goes_on_like_any_other() -> None:
    with open_engine() as engine, engine.session() as session, engine.session() as whole:
        whole.prefill(ids_of(3))
        drawn = [step.token_id for step in whole.generate(None, greedy(40))]
        for place in (0, 1, 2, 17):
            stop = qwen_moe.SamplingParams(
                max_tokens=40, ignore_eos=True, stop_token_ids=[drawn[place]]
            )
            end = drawn.index(drawn[place]) + 1
            session.reset()
            session.prefill(ids_of(3))
            got = [step.token_id for step in session.generate(None, stop)]
            assert got == drawn[:end]
            assert session.tokens == ids_of(3) + drawn[:end]
            rest = [step.token_id for step in session.generate(None, greedy(40 - end))]
            assert rest == drawn[end:]


# --- Draws ----------------------------------------------------------------------


def test_seeded_draws_repeat_alone_and_in_company(single: qwen_moe.Engine) -> None:
    prompts = [ids_of(row) for row in range(16)]
    settings = [seeded(row) for row in range(16)]
    with open_engine(max_sessions=16, poison=True) as engine:
        first = engine.generate(prompts, settings)
        assert engine.generate(prompts, settings) == first
        assert engine.generate(prompts[::-1], settings[::-1]) == first[::-1]
    for row in range(16):
        assert single.generate([prompts[row]], settings[row])[0] == first[row], f"row {row}"
    replies = [
        tuple(single.generate([ids_of(0)], seeded(6 * seed))[0].token_ids) for seed in range(8)
    ]
    assert len(set(replies)) > 4, "the seed changes nothing"


def test_logprobs_are_those_of_the_logits(single: qwen_moe.Engine) -> None:
    for sampling in (greedy(1, logprobs=20), seeded(1, 1), seeded(2, 1)):
        with single.session() as session:
            session.prefill(ids_of(3))
            for _ in range(6):
                step = session.decode(sampling)
                want = session.logits.double().log_softmax(-1)
                assert step.logprob == pytest.approx(float(want[step.token_id]), abs=1e-4)
                assert len(step.top_logprobs) == sampling.logprobs
                values = [value for _, value in step.top_logprobs]
                assert values == sorted(values, reverse=True)
                best = want.topk(len(values)).values.tolist()
                assert values == pytest.approx(best, abs=1e-4)
                for token, value in step.top_logprobs:
                    assert value == pytest.approx(float(want[token]), abs=1e-4)
                if sampling.temperature == 0:
                    assert step.token_id == int(session.logits.argmax())


def test_draws_are_those_of_the_cpu_from_the_same_logits(tmp_path: Path) -> None:
    """The logits row is part of a saved session, so that both draw from the same one."""
    with open_engine() as engine, engine.session() as session:
        session.prefill(ids_of(3))
        session.save(tmp_path / "session")
    drawn: dict[str, list[int]] = {}
    for device in (DEVICE, "cpu"):
        with open_engine(device=device) as engine:
            drawn[device] = []
            for seed in range(200):
                with engine.restore(tmp_path / "session") as restored:
                    drawn[device].append(restored.decode(seeded(seed)).token_id)
    differ = sum(a != b for a, b in zip(drawn[DEVICE], drawn["cpu"], strict=True))
    assert differ <= 2, "more than rounding at the boundary between two tokens"
    assert len(set(drawn["cpu"])) > 10
