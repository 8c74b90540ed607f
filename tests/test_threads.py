"""Several threads, several thread counts, and Ctrl-C: the same bits, and nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import oracle
import qwen_moe
from qwen_moe import _core

PROMPTS = ["In the", "The old house " * 12, "He said", "A dog and a cat", "When", "It was " * 20]
LIMIT = 120  # seconds after which a thread counts as hanging


@pytest.fixture(scope="module")
def engine() -> Iterator[qwen_moe.Engine]:
    with qwen_moe.Engine(device="cpu", quantize="int4", max_sessions=8, max_context=256) as opened:
        yield opened


def sampling(seed: int) -> qwen_moe.SamplingParams:
    return qwen_moe.SamplingParams(
        temperature=0.8, top_p=0.9, seed=seed, max_tokens=20, ignore_eos=True, logprobs=1
    )


def run_threads(works: list[Callable[[], None]]) -> None:
    """All at once; an exception of any is raised here, and so is one that hangs."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait(LIMIT)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"


def drive(engine: qwen_moe.Engine, seed: int) -> list:
    """One session's life: tokens, log probabilities and logits."""
    out: list = []
    with engine.session() as session:
        session.prefill(PROMPTS[seed % len(PROMPTS)])
        for _ in range(8):
            step = session.decode(sampling(seed))
            out.append((step.token_id, step.logprob, session.logits.numpy().tobytes()))
        with session.fork() as fork:
            fork.prefill(" and then")
            out.append([step.token_id for step in fork.generate(" the", sampling(seed))])
        session.reset()
        session.prefill(PROMPTS[-1])
        out.append(session.logits.numpy().tobytes())
    return out


def test_threads_that_drive_their_own_sessions_get_what_they_get_alone(
    engine: qwen_moe.Engine,
) -> None:
    seeds = range(4)
    want = {seed: drive(engine, seed) for seed in seeds}
    got: dict[int, list] = {}

    def work(seed: int) -> None:
        for _ in range(2):
            got[seed] = drive(engine, seed)
            assert got[seed] == want[seed]

    run_threads([lambda seed=seed: work(seed) for seed in seeds])
    assert got == want
    assert engine.stats["sessions_open"] == 0


def test_batches_sessions_and_bookkeeping_may_run_at_once(
    engine: qwen_moe.Engine, tmp_path: Path
) -> None:
    want = [engine.generate([prompt], sampling(3))[0] for prompt in PROMPTS]
    alone = drive(engine, 1)
    done = threading.Event()

    def batch() -> None:
        try:
            for _ in range(2):
                assert engine.generate(PROMPTS[:4], sampling(3)) == want[:4]
        finally:
            done.set()

    def session() -> None:
        assert drive(engine, 1) == alone

    def bookkeeping() -> None:
        while not done.is_set():
            assert engine.stats["sessions_open"] >= 0
            with engine.session() as one:
                one.prefill("x")
                one.save(tmp_path / "one")
                with engine.restore(tmp_path / "one") as two:
                    assert torch.equal(one.logits, two.logits)

    run_threads([batch, session, bookkeeping])


def test_two_engines_on_the_same_weights_may_run_at_once(engine: qwen_moe.Engine) -> None:
    want = engine.generate(PROMPTS[:3], sampling(5))
    settings = {"device": "cpu", "quantize": "int4", "max_sessions": 3, "max_context": 256}

    def work() -> None:
        with qwen_moe.Engine(**settings) as other:
            for _ in range(2):
                assert other.generate(PROMPTS[:3], sampling(5)) == want

    run_threads([work, work])


@pytest.mark.parametrize("recipe", ["none", "int8", "int4"])
def test_any_number_of_compute_threads_gives_the_same_bits(recipe: str) -> None:
    reference = oracle.random_model(oracle.text_config(num_experts_per_tok=3), seed=2)

    def everything(threads: int) -> list:
        model = oracle.core_model(reference, recipe=recipe, threads=threads)
        engine = oracle.core_engine(model, kv_dtype="bfloat16")
        sessions = [engine.open() for _ in range(3)]
        for i, session in enumerate(sessions):
            drawn = _core.Sampling(temperature=0.9, seed=i, logprobs=2)
            engine.submit(
                session, oracle.prompt(40 + 70 * i, seed=i), sampling=drawn, max_tokens=10
            )
        engine.run(sessions)
        out = []
        for session in sessions:
            progress = engine.poll(session)
            out.append((progress.token_ids, progress.logprobs, progress.top_logprobs))
            out.append(oracle.core_logits(engine, session, 384))
            out.append(engine.export_state(session))
        return out

    want = everything(1)
    for threads in (2, 3):
        assert everything(threads) == want


INTERRUPTED = """
    import os, signal, threading, time
    import qwen_moe

    # A shell has it ignored for what runs behind it, and the tests may be such a thing.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(engine, after):
        def wait():
            while engine.stats["decode_tokens"] < after:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=wait, daemon=True).start()

    short = qwen_moe.SamplingParams(max_tokens=8, ignore_eos=True)
    endless = qwen_moe.SamplingParams(max_tokens=4000, ignore_eos=True)
    with qwen_moe.Engine(device="cpu", quantize="int4", max_sessions=4) as engine:
        want = engine.generate(["In the", "He said"], short)
        session = engine.session()
        session.prefill("The king")

        def batch():
            engine.generate(["One", "Two", "Three"], endless)

        def stream():
            for _ in session.generate(" of", endless):
                pass

        for run in (batch, stream):
            before = engine.stats["decode_tokens"]
            interrupt(engine, before + 20)
            try:
                run()
            except KeyboardInterrupt:
                pass
            else:
                raise SystemExit("no KeyboardInterrupt")
            assert engine.stats["decode_tokens"] < before + 4000, "ran to the end"
            assert engine.stats["sessions_open"] == 1, "sessions were left behind"
            assert engine.generate(["In the", "He said"], short) == want

        session.reset()
        session.prefill("The king")
        assert session.decode(short).token_id >= 0
    print("usable")
"""


def test_ctrl_c_stops_and_leaves_the_engine_usable() -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "usable"
