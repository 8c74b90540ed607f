"""What one session or engine does never shows in another, to the last bit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import oracle
import qwen_moe
from qwen_moe import _core

PROMPTS = [
    "In the beginning",
    "The king said to his servants, that they should go up to the city and look",
    "A",
    "What is the name of the river that runs by the old town? " * 4,
    "def main():",
    "And it came to pass in those days",
    "She opened the letter and read it twice. " * 9,
    "One, two, three,",
]
SAMPLINGS = [
    qwen_moe.SamplingParams(max_tokens=12, ignore_eos=True, logprobs=3),
    qwen_moe.SamplingParams(
        temperature=0.9, top_p=0.95, seed=7, max_tokens=12, ignore_eos=True, logprobs=0
    ),
]
GREEDY = SAMPLINGS[0]
LENGTHS = [1, 63, 64, 65, 130]


def open_tiny(**settings) -> qwen_moe.Engine:
    defaults = {"device": "cpu", "max_sessions": 3, "max_context": 384, "quantize": "int4"}
    return qwen_moe.Engine(**(defaults | settings))


@pytest.fixture(scope="module")
def engine() -> Iterator[qwen_moe.Engine]:
    with open_tiny() as opened:
        yield opened


def ids_of(engine: qwen_moe.Engine, length: int, start: int = 0) -> list[int]:
    ids = engine.tokenizer.encode(" ".join(PROMPTS))
    assert len(ids) >= start + length
    return list(ids[start : start + length])


def walk(session: qwen_moe.Session, steps: int = 6) -> list[tuple[int, bytes]]:
    """Greedy tokens, and the bits of the logits that each was drawn from."""
    out = []
    for _ in range(steps):
        token = session.decode(GREEDY).token_id
        logits = session.logits
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()
        out.append((token, logits.numpy().tobytes()))
    return out


def alone(engine: qwen_moe.Engine, ids: list[int], steps: int = 6) -> list[tuple[int, bytes]]:
    with engine.session() as session:
        session.prefill(ids)
        return walk(session, steps)


# --- Batches ------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_prompt_in_a_batch_gives_what_it_gives_alone(
    recipe_engine: qwen_moe.Engine, count: int, sampling: qwen_moe.SamplingParams
) -> None:
    together = recipe_engine.generate(PROMPTS[:count], sampling)
    singly = [recipe_engine.generate([prompt], sampling)[0] for prompt in PROMPTS[:count]]
    assert together == singly
    assert recipe_engine.stats["max_decode_rows"] >= count, "the batch never shared a step"


def test_a_prompt_has_the_same_bits_at_any_place_in_the_batch(
    recipe_engine: qwen_moe.Engine,
) -> None:
    forward = recipe_engine.generate(PROMPTS, GREEDY)
    backward = recipe_engine.generate(PROMPTS[::-1], GREEDY)
    assert forward == backward[::-1]
    same = recipe_engine.generate([PROMPTS[0]] * 8, GREEDY)
    assert same == [forward[0]] * 8


def test_more_prompts_than_sessions_are_served_in_order(engine: qwen_moe.Engine) -> None:
    assert len(PROMPTS) > engine.capacity.max_sessions
    together = engine.generate(PROMPTS, GREEDY)
    assert together == [engine.generate([prompt], GREEDY)[0] for prompt in PROMPTS]


# --- Slots --------------------------------------------------------------------


@functools.cache
def small_model() -> _core.Model:
    config = oracle.text_config(hidden_size=64, layer_types=["linear_attention", "full_attention"])
    return oracle.core_model(oracle.random_model(config, seed=5))


def core_run(engine: _core.Engine, session: int, tokens: list[int]) -> tuple[list[int], bytes]:
    engine.submit(session, tokens, sampling=_core.Sampling(), max_tokens=5)
    engine.run([session])
    progress = engine.poll(session)
    assert progress.error == ""
    return progress.token_ids, oracle.core_logits(engine, session, 384)


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("again", ["close", "reset", "failed fork"])
def test_a_slot_used_before_is_like_new(again: str, poison: bool) -> None:
    prompt, secret = oracle.prompt(70, seed=1), oracle.prompt(150, seed=2)
    fresh = oracle.core_engine(small_model(), max_sessions=1, poison=poison)
    want = core_run(fresh, fresh.open(), prompt)

    engine = oracle.core_engine(small_model(), max_sessions=1, poison=poison)
    session = engine.open()
    core_run(engine, session, secret)
    if again == "reset":
        engine.reset(session)
    else:
        if again == "failed fork":
            with pytest.raises(qwen_moe.CapacityError):
                engine.fork(session)
        engine.close(session)
        assert engine.stats["pages_used"] == 0
        session = engine.open()
    assert core_run(engine, session, prompt) == want


def test_pages_come_back_when_sessions_that_share_them_are_gone() -> None:
    engine = oracle.core_engine(small_model(), max_sessions=3, poison=True)
    first = engine.open()
    core_run(engine, first, oracle.prompt(150))
    forks = [engine.fork(first), engine.fork(first)]
    shared = engine.stats["pages_used"]
    assert shared < 3 * engine.stats["pages_total"] / 3
    engine.close(first)
    assert core_run(engine, forks[0], [1, 2]) == core_run(engine, forks[1], [1, 2])
    for session in forks:
        engine.close(session)
    assert engine.stats["pages_used"] == 0


def test_a_closed_session_is_refused_by_every_call() -> None:
    engine = oracle.core_engine(small_model(), max_sessions=1)
    session = engine.open()
    engine.close(session)
    assert engine.open() != session
    for call in (engine.close, engine.reset, engine.fork, engine.stop, engine.cancel, engine.poll):
        with pytest.raises(qwen_moe.InvalidArgument, match=str(session)):
            call(session)


def test_capacity_exhausted_is_an_error_that_says_how_many(engine: qwen_moe.Engine) -> None:
    sessions = [engine.session() for _ in range(engine.capacity.max_sessions)]
    with pytest.raises(qwen_moe.CapacityError, match="3"):
        engine.session()
    sessions[0].prefill("There was")
    with pytest.raises(qwen_moe.CapacityError, match="3"):
        sessions[0].fork()
    want = walk(sessions[0])
    sessions.pop().close()
    with engine.session() as again:
        again.prefill("There was")
        assert walk(again) == want
    for session in sessions:
        session.close()


def test_state_that_cannot_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(qwen_moe.CapacityError, match=r"4096.*\d"):
        oracle.core_engine(small_model(), max_sessions=4096, max_context=2**22)


# --- One session fails --------------------------------------------------------


def test_a_logit_that_is_not_finite_poisons_that_session_alone() -> None:
    """In the last layer one expert overflows, so that only some prompts meet it."""
    config = oracle.text_config(
        hidden_size=64,
        layer_types=["linear_attention", "full_attention"],
        num_experts_per_tok=1,
    )
    reference = oracle.random_model(config, seed=3, dtype=torch.float32)
    with torch.no_grad():
        reference.model.layers[-1].mlp.experts.down_proj[3].fill_(3e38)
    model = oracle.core_model(reference, dtype=torch.float32)

    def run_alone(tokens: list[int]) -> tuple[str, list[int]]:
        engine = oracle.core_engine(model, max_sessions=1)
        session = engine.open()
        engine.submit(session, tokens, sampling=_core.Sampling(), max_tokens=4)
        engine.run([session])
        progress = engine.poll(session)
        return progress.error, progress.token_ids

    outcomes = {seed: run_alone(oracle.prompt(20, seed=seed)) for seed in range(40)}
    bad = next(seed for seed, (error, _) in outcomes.items() if error)
    good = next(seed for seed, (error, _) in outcomes.items() if not error)

    engine = oracle.core_engine(model, max_sessions=2)
    failing, healthy = engine.open(), engine.open()
    for session, seed in ((failing, bad), (healthy, good)):
        prompt = oracle.prompt(20, seed=seed)
        engine.submit(session, prompt, sampling=_core.Sampling(), max_tokens=4)
    engine.run([failing, healthy])

    progress = engine.poll(failing)
    assert progress.finish_reason == "error"
    assert "not finite" in progress.error
    assert engine.poisoned(failing) == progress.error
    progress = engine.poll(healthy)
    assert (progress.error, progress.token_ids) == outcomes[good]
    for call in (
        lambda: engine.submit(failing, [1], sampling=None, max_tokens=0),
        lambda: engine.export_state(failing),
        lambda: engine.fork(failing),
    ):
        with pytest.raises(qwen_moe.Error, match="not finite"):
            call()

    engine.reset(failing)
    assert engine.poisoned(failing) == ""
    engine.submit(failing, oracle.prompt(20, seed=good), sampling=_core.Sampling(), max_tokens=4)
    engine.run([failing])
    assert engine.poll(failing).token_ids == outcomes[good][1]


# --- Fork ---------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_a_fork_and_its_origin_go_separate_ways(engine: qwen_moe.Engine, length: int) -> None:
    ids, left, right = ids_of(engine, length), ids_of(engine, 70, 40), ids_of(engine, 66, 20)

    def separate(more: list[int]) -> list[tuple[int, bytes]]:
        with engine.session() as session:
            session.prefill(ids)
            session.prefill(more)
            return walk(session)

    want = separate(left), separate(right)
    with engine.session() as origin:
        origin.prefill(ids)
        with origin.fork() as fork:
            assert fork.position == origin.position == length
            assert fork.tokens == origin.tokens
            assert torch.equal(fork.logits, origin.logits)
            fork.prefill(right)
            origin.prefill(left)
            assert fork.tokens == ids + right
            # Alternating, so that both write their own next positions in turn.
            steps = [(walk(origin, 1)[0], walk(fork, 1)[0]) for _ in range(6)]
    assert [step[0] for step in steps] == want[0]
    assert [step[1] for step in steps] == want[1]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_fork_outlives_its_origin(engine: qwen_moe.Engine, length: int) -> None:
    ids = ids_of(engine, length)
    want = alone(engine, ids)
    origin = engine.session()
    origin.prefill(ids)
    with origin.fork() as fork:
        origin.close()
        with engine.session() as other:  # takes the slot that the origin left
            other.prefill(ids_of(engine, 100, 30))
            assert walk(fork) == want


# --- Save and restore ---------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_a_restored_session_goes_on_bit_for_bit(
    engine: qwen_moe.Engine, length: int, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    with engine.session() as session:
        session.prefill(ids_of(engine, length))
        drawn = walk(session, 2)
        session.save(path)
        tokens = session.tokens
        want = [session.decode(GREEDY).token_id for _ in range(3)], walk(session)
    assert drawn
    with open_tiny(max_sessions=1) as other, other.restore(path) as restored:
        assert restored.tokens == tokens
        got = [restored.decode(GREEDY).token_id for _ in range(3)], walk(restored)
    assert got == want


def test_a_session_seeded_and_saved_draws_the_same_tokens_later(
    engine: qwen_moe.Engine, tmp_path: Path
) -> None:
    seeded = SAMPLINGS[1]
    with engine.session() as session:
        session.prefill("Once upon a time")
        session.save(tmp_path / "session")
        want = [session.decode(seeded).token_id for _ in range(12)]
    assert len(set(want)) > 3
    with engine.restore(tmp_path / "session") as restored:
        assert [restored.decode(seeded).token_id for _ in range(12)] == want


@pytest.fixture(scope="module")
def snapshot(engine: qwen_moe.Engine, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("snapshot") / "session"
    with engine.session() as session:
        session.prefill(ids_of(engine, 65))
        session.decode(GREEDY)
        session.save(path)
    return path.read_bytes()


def assert_refused(engine: qwen_moe.Engine, path: Path, error: type[Exception]) -> None:
    before = engine.stats
    with pytest.raises(error) as caught:
        engine.restore(path)
    assert isinstance(caught.value, (qwen_moe.Error, OSError))
    assert path.name in str(caught.value) or "max_context" in str(caught.value)
    for counter in ("sessions_open", "pages_used"):
        assert engine.stats[counter] == before[counter], "something half-made was left behind"


@pytest.mark.parametrize("share", [i / 24 for i in range(24)] + [0.9999])
def test_a_snapshot_with_a_flipped_bit_is_refused(
    engine: qwen_moe.Engine, snapshot: bytes, share: float, tmp_path: Path
) -> None:
    data = bytearray(snapshot)
    data[int(share * len(data))] ^= 1 << int(share * 64) % 8
    (tmp_path / "flipped").write_bytes(data)
    assert_refused(engine, tmp_path / "flipped", qwen_moe.FormatError)


@pytest.mark.parametrize("byte", range(0, 400, 7))
def test_a_snapshot_with_a_flipped_bit_in_its_head_is_refused(
    engine: qwen_moe.Engine, snapshot: bytes, byte: int, tmp_path: Path
) -> None:
    data = bytearray(snapshot)
    data[byte] ^= 0x10
    (tmp_path / "flipped").write_bytes(data)
    assert_refused(engine, tmp_path / "flipped", qwen_moe.FormatError)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, -1000, -1])
def test_a_truncated_snapshot_is_refused(
    engine: qwen_moe.Engine, snapshot: bytes, kept: int, tmp_path: Path
) -> None:
    (tmp_path / "short").write_bytes(snapshot[:kept])
    assert_refused(engine, tmp_path / "short", qwen_moe.FormatError)


def test_a_snapshot_with_more_behind_it_is_refused(
    engine: qwen_moe.Engine, snapshot: bytes, tmp_path: Path
) -> None:
    (tmp_path / "long").write_bytes(snapshot + b"\0")
    assert_refused(engine, tmp_path / "long", qwen_moe.FormatError)


def test_a_missing_snapshot_is_refused(engine: qwen_moe.Engine, tmp_path: Path) -> None:
    assert_refused(engine, tmp_path / "nothing", Exception)


@pytest.mark.parametrize(
    "settings", [{"quantize": "int8"}, {"quantize": None}, {"kv_dtype": "float32"}], ids=str
)
def test_a_snapshot_of_another_recipe_is_refused(
    snapshot: bytes, settings: dict, tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(snapshot)
    with open_tiny(**settings) as other:
        assert_refused(other, tmp_path / "other", qwen_moe.Error)


def test_a_snapshot_of_another_model_is_refused(snapshot: bytes, tmp_path: Path) -> None:
    """Also of one with the same shapes, where every buffer would fit."""
    config = oracle.text_config(layer_types=["linear_attention", "full_attention"])
    (tmp_path / "other").write_bytes(snapshot)
    for seed in (0, 1):
        oracle.save(oracle.random_model(config, seed=seed), tmp_path / f"model {seed}")
    settings = {"device": "cpu", "max_sessions": 1, "max_context": 128}
    with qwen_moe.Engine(tmp_path / "model 0", **settings) as other:
        assert_refused(other, tmp_path / "other", qwen_moe.Error)
        with other.session() as session:
            session.prefill([1, 2, 3])
            session.save(tmp_path / "twin")
    with qwen_moe.Engine(tmp_path / "model 1", **settings) as twin:
        assert_refused(twin, tmp_path / "twin", qwen_moe.Error)


def test_a_snapshot_longer_than_the_context_is_refused(snapshot: bytes, tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(snapshot)
    with open_tiny(max_context=32) as other:
        assert_refused(other, tmp_path / "long", qwen_moe.Error)


# --- Shards and shared weights ------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_layers_over_several_devices_give_the_same_bits(quantize: str | None) -> None:
    def everything(**settings) -> tuple:
        with open_tiny(quantize=quantize, **settings) as opened:
            batch = opened.generate(PROMPTS[:3], SAMPLINGS[1])
            return batch, alone(opened, ids_of(opened, 130))

    want = everything()
    assert everything(device="auto", devices=["cpu", "cpu"], split=[4]) == want
    assert everything(device="auto", devices=["cpu", "cpu", "cpu"], split=[1, 7]) == want


@pytest.mark.parametrize("split", [[], [0], [8], [9], [-1], [4, 4], [3, 5]], ids=str)
def test_a_split_that_does_not_cover_the_layers_is_refused(split: list[int]) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="split"):
        open_tiny(device="auto", devices=["cpu", "cpu"], split=split)


def test_a_second_model_of_the_same_checkpoint_shares_every_weight() -> None:
    config = oracle.text_config(hidden_size=64, layer_types=["linear_attention", "full_attention"])
    reference = oracle.random_model(config)
    first = oracle.core_model(reference, checkpoint="shared", threads=1)
    assert not any(slot.resident for slot in _empty(config, "another").slots)
    second = _empty(config, "shared")
    assert all(slot.resident for slot in second.slots)
    second.finish()  # complete, although nothing was put

    runs = []
    for model in (first, second):
        engine = oracle.core_engine(model, max_sessions=1)
        runs.append(core_run(engine, engine.open(), oracle.prompt(70)))
    assert runs[0] == runs[1]

    del first, second, model, engine
    assert not any(slot.resident for slot in _empty(config, "shared").slots), "never freed"


def _empty(config, checkpoint: str) -> _core.Model:
    return _core.Model(
        config=oracle.core_config(config),
        recipe="none",
        dtype="bfloat16",
        checkpoint=checkpoint,
        devices=["cpu"],
        split=[],
        threads=2,
    )


def test_engines_that_share_weights_do_not_share_sessions(engine: qwen_moe.Engine) -> None:
    want = alone(engine, ids_of(engine, 65))
    with engine.session() as here, open_tiny() as other, other.session() as there:
        here.prefill(ids_of(engine, 65))
        there.prefill(ids_of(engine, 80, 50))
        there.decode(GREEDY)
        assert walk(here) == want
        other.close()
    assert alone(engine, ids_of(engine, 65)) == want


# --- Stop ---------------------------------------------------------------------


def test_stop_from_another_thread_ends_a_generation(engine: qwen_moe.Engine) -> None:
    drawing, stopped = threading.Event(), threading.Event()
    forever = qwen_moe.SamplingParams(max_tokens=300, ignore_eos=True)
    steps: list[qwen_moe.Step] = []

    with engine.session() as session:

        def generate() -> None:
            for step in session.generate("The", forever):
                steps.append(step)
                if len(steps) == 3:
                    drawing.set()
                    stopped.wait(60)

        thread = threading.Thread(target=generate)
        thread.start()
        assert drawing.wait(60)
        session.stop()
        stopped.set()
        thread.join(60)
        assert not thread.is_alive()
        assert 3 <= len(steps) <= 5

        # What was drawn stays, and the session goes on as if nothing had happened.
        drawn = [step.token_id for step in steps]
        assert session.tokens[-len(drawn) :] == drawn
        on = [session.decode(GREEDY).token_id for _ in range(5)]
        session.reset()
        session.prefill("The")
        again = [session.decode(GREEDY).token_id for _ in range(len(drawn) + 5)]
        assert again == drawn + on


def test_stop_ends_a_long_run_of_the_core_and_never_waits() -> None:
    engine = oracle.core_engine(small_model(), max_sessions=2, max_context=100_000)
    session, other = engine.open(), engine.open()
    sampling = _core.Sampling()
    engine.submit(session, [1], sampling=sampling, max_tokens=90_000)
    engine.submit(other, [2], sampling=sampling, max_tokens=20)
    thread = threading.Thread(target=engine.run, args=([session],))
    thread.start()
    while engine.stats["decode_tokens"] < 50:
        pass
    engine.stop(session)
    thread.join(60)
    assert not thread.is_alive()
    progress = engine.poll(session)
    assert progress.finish_reason == "stopped"
    assert 1 <= len(progress.token_ids) < 90_000
    engine.run([other])
    assert len(engine.poll(other).token_ids) == 20, "stop reached another session"
