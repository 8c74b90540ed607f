"""Snapshots, refusals and memory on a GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import oracle
import qwen_moe
from gpu_rig import DEVICE, STEP, assert_close, greedy, ids_of, open_engine, text_ids, walk
from qwen_moe import _core, bench

pytestmark = pytest.mark.gpu


# --- Fork, save, restore, reset -------------------------------------------------


@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_forks_and_restored_sessions_go_on_bit_for_bit(length: int, tmp_path: Path) -> None:
    ids = text_ids()[:length]
    with open_engine(max_sessions=3, poison=True) as engine, engine.session() as session:
        session.prefill(ids)
        session.decode(STEP)
        want_tokens = session.tokens
        with engine.session() as straight:
            straight.prefill(ids)
            straight.decode(STEP)
            want = walk(straight, 20)
        session.save(tmp_path / "session")
        with session.fork() as fork:
            pairs = [(walk(session, 1)[0], walk(fork, 1)[0]) for _ in range(10)]
            assert [a for a, _ in pairs] == [b for _, b in pairs] == want[:10]
            session.close()
            assert walk(fork, 10) == want[10:]
        with engine.restore(tmp_path / "session") as restored:
            assert restored.tokens == want_tokens
            assert walk(restored, 20) == want
            restored.reset()
            restored.prefill(ids)
            restored.decode(STEP)
            assert walk(restored, 20) == want
    with open_engine(max_sessions=1) as other, other.restore(tmp_path / "session") as elsewhere:
        assert walk(elsewhere, 20) == want


@pytest.mark.parametrize(("source", "target"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_saved_session_goes_on_on_the_other_device(
    source: str, target: str, tmp_path: Path
) -> None:
    with open_engine(device=source) as engine, engine.session() as session:
        session.prefill(ids_of(3, 65))
        session.save(tmp_path / "session")
        following = text_ids()[:12]
        want = after(session, following)
    with open_engine(device=target) as engine, engine.restore(tmp_path / "session") as restored:
        assert restored.tokens == ids_of(3, 65)
        assert_close(after(restored, following), want)


def after(session: qwen_moe.Session, ids: list[int]) -> torch.Tensor:
    rows = [session.logits]
    for token in ids:
        session.prefill([token])
        rows.append(session.logits)
    return torch.stack(rows)


# --- Capacity and refusals ------------------------------------------------------


def test_more_sessions_than_asked_for_are_refused() -> None:
    with open_engine(max_sessions=3) as engine:
        sessions = [engine.session() for _ in range(3)]
        with pytest.raises(qwen_moe.CapacityError, match="3"):
            engine.session()
        sessions[0].prefill(ids_of(0))
        with pytest.raises(qwen_moe.CapacityError, match="3"):
            sessions[0].fork()
        want = walk(sessions[0], 5)
        sessions.pop().close()
        with engine.session() as again:
            again.prefill(ids_of(0))
            assert walk(again, 5) == want
        for session in sessions:
            session.close()


@pytest.mark.parametrize(
    ("sessions", "context"), [(4096, 2**18), (1, 2**28)], ids=["sessions", "context"]
)
def test_state_that_cannot_fit_is_refused_with_the_numbers(sessions: int, context: int) -> None:
    config = oracle.text_config(hidden_size=256, layer_types=["linear_attention", "full_attention"])
    model = oracle.core_model(oracle.random_model(config), devices=(DEVICE,))
    for _ in range(3):  # what was half made is given back
        with pytest.raises(qwen_moe.CapacityError, match=rf"{sessions}.*\d"):
            oracle.core_engine(
                model, max_sessions=sessions, max_context=context, kv_dtype="bfloat16"
            )
    engine = oracle.core_engine(model, max_sessions=2, kv_dtype="bfloat16")
    session = engine.open()
    engine.submit(session, [1, 2, 3], sampling=_core.Sampling(), max_tokens=3)
    engine.run([session])
    assert len(engine.poll(session).token_ids) == 3


def test_settings_that_a_gpu_cannot_do_are_refused() -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="kv_dtype"):
        open_engine(kv_dtype="float32")
    with pytest.raises(qwen_moe.DeviceError, match="99"):
        open_engine(device="cuda:99")


# --- Memory ---------------------------------------------------------------------


def free_bytes() -> int:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA to ask for free memory")
    return torch.cuda.mem_get_info(0)[0]


def test_the_ledger_names_everything_once() -> None:
    with open_engine() as engine:
        ledger = engine.memory
        assert ledger["total"] == sum(size for name, size in ledger.items() if name != "total")
        for name in ("weights", "session state", "kv pages", "scratch"):
            assert ledger[name] > 0, name
        capacity = engine.capacity
        assert capacity.reason == "requested"
        state = ledger["session state"] + ledger["kv pages"]
        assert state >= capacity.max_sessions * capacity.bytes_per_session
        for _ in range(2):
            engine.generate([ids_of(0), ids_of(1)], greedy(8))
        assert engine.memory == ledger, "a step took memory"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_engine_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(bench.PRESETS["small"]))
    settings = {"path": tmp_path, "load_format": "dummy", "quantize": "int4"}
    before = free_bytes()
    with open_engine(**settings) as first:
        ledger = first.memory
        taken = before - free_bytes()
        assert taken >= 0.95 * ledger["weights"]
        assert taken <= 1.1 * ledger["total"] + 512 * 2**20, "the context and its modules besides"
        between = free_bytes()
        with open_engine(**settings) as second:
            again = between - free_bytes()
            assert again <= ledger["total"] - ledger["weights"] + 64 * 2**20
            want = first.generate([[1, 2, 3]], greedy(8))
            assert second.generate([[1, 2, 3]], greedy(8)) == want
        assert first.generate([[1, 2, 3]], greedy(8)) == want
    assert before - free_bytes() <= taken - 0.9 * ledger["weights"], "never freed"


def test_sessions_come_and_go_without_new_memory() -> None:
    with open_engine(max_sessions=8) as engine:
        prompts = [ids_of(row) for row in range(8)]
        engine.generate(prompts, greedy(8))  # every graph that it needs
        before = free_bytes()
        for _ in range(5):
            engine.generate(prompts, greedy(8))
        assert math.isclose(free_bytes(), before, abs_tol=2**20)
