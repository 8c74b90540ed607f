"""The Python API: what Engine and Session promise beyond isolation."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_moe
from qwen_moe import SamplingParams, _core
from qwen_moe.engine import EMBEDDED
from qwen_moe.placement import resolve_split

PROMPTS = ["In the beginning", "A", "The king said to his servants, that they should", "One, two,"]
# Drawn at random, so that the text varies whatever the weights are.
DRAWN = SamplingParams(temperature=1.5, seed=11, max_tokens=40, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def with_(params: SamplingParams, **changes: Any) -> SamplingParams:
    fields = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    return SamplingParams(**(fields | changes))


def open_tiny(path: Path | None = None, **settings: Any) -> qwen_moe.Engine:
    defaults = {"device": "cpu", "quantize": "int4", "max_sessions": 3, "max_context": 128}
    return qwen_moe.Engine(path, **(defaults | settings))


@pytest.fixture(scope="module")
def engine() -> Iterator[qwen_moe.Engine]:
    with open_tiny() as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_session_stays_open(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").stats["sessions_open"] == 0


@pytest.fixture
def session(engine: qwen_moe.Engine) -> Iterator[qwen_moe.Session]:
    with engine.session() as opened:
        yield opened


@pytest.fixture(scope="module")
def without_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "tiny"
    return shutil.copytree(EMBEDDED, path, ignore=shutil.ignore_patterns("tok*", "*.jinja"))


def joined(steps: list[qwen_moe.Step]) -> str:
    return "".join(step.text for step in steps)


# --- Opening ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"quantize": "int3"}, qwen_moe.InvalidArgument, "quantize.*'int3'"),
        ({"kv_dtype": "float16"}, qwen_moe.InvalidArgument, "kv_dtype.*'float16'"),
        ({"device": "tpu"}, qwen_moe.InvalidArgument, "device.*'tpu'"),
        ({"device": "cuda:x"}, qwen_moe.InvalidArgument, "device.*'cuda:x'"),
        ({"devices": ["cpu"]}, qwen_moe.InvalidArgument, "device or devices"),
        ({"device": "auto", "devices": []}, qwen_moe.InvalidArgument, "devices"),
        ({"device": "auto", "devices": "cpu"}, qwen_moe.InvalidArgument, "devices.*list"),
        ({"device": "auto", "devices": ["cpu"] * 9}, qwen_moe.InvalidArgument, "9 dev.*8 layers"),
        ({"split": [4]}, qwen_moe.InvalidArgument, r"split.*\[4\] for 1 devices and 8 layers"),
        ({"max_sessions": 0}, qwen_moe.InvalidArgument, "max_sessions.*0"),
        ({"max_context": 0}, qwen_moe.InvalidArgument, "max_context.*0"),
        ({"max_context": 10**6}, qwen_moe.InvalidArgument, "1000000.*max_position_embeddings"),
        ({"threads": 0}, qwen_moe.InvalidArgument, "threads.*0"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_work_is_refused(
    settings: dict, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_tiny(**settings)


def test_cuda_where_there_is_none_is_a_device_error() -> None:
    if _core.cuda_available():
        pytest.skip("there is CUDA")
    with pytest.raises(qwen_moe.DeviceError, match=r"'cuda:1'.*no CUDA"):
        open_tiny(device="cuda:1")


def test_the_context_defaults_to_what_the_model_allows() -> None:
    with open_tiny(max_context=None, max_sessions=1) as opened:
        assert opened.max_context == min(4096, opened.config.max_position_embeddings)


def test_the_default_context_is_moderate_however_long_the_model_allows(tmp_path: Path) -> None:
    config = json.loads((EMBEDDED / "config.json").read_text())
    config["max_position_embeddings"] = 10**6
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_tiny(tmp_path, max_context=None, max_sessions=1, load_format="dummy") as opened:
        assert opened.max_context == 4096


def test_layers_are_shared_out_evenly_without_a_split() -> None:
    assert resolve_split(None, 3, 8) == [2, 5]
    assert resolve_split(None, 1, 8) == []
    with open_tiny() as whole, open_tiny(device="auto", devices=["cpu"] * 3) as spread:
        assert spread.devices == ["cpu"] * 3
        assert spread.generate(PROMPTS[0], GREEDY) == whole.generate(PROMPTS[0], GREEDY)


def test_an_engine_says_what_it_is(engine: qwen_moe.Engine) -> None:
    assert repr(engine).startswith("Engine(")
    assert "int4" in repr(engine)
    capacity = engine.capacity
    assert (capacity.max_sessions, capacity.reason) == (3, "requested")
    fixed, per_token = _core.session_bytes(engine.config, "bfloat16")
    assert capacity.bytes_per_session == fixed + per_token * 128
    assert engine.memory["total"] >= engine.memory["weights"] > 0
    assert engine.eos_token_ids == engine.tokenizer.eos_token_ids
    assert qwen_moe.__version__ == _core.__version__


def test_a_closed_engine_or_session_is_refused_and_closing_twice_is_fine() -> None:
    opened = open_tiny()
    session, other = opened.session(), opened.session()
    session.close()
    session.close()
    assert repr(session) == "Session(closed)"
    for call in (session.reset, session.fork, session.stop, session.decode):
        with pytest.raises(qwen_moe.InvalidArgument, match="session is closed"):
            call()
    with pytest.raises(qwen_moe.InvalidArgument, match="session is closed"):
        session.prefill("x")
    opened.close()
    opened.close()
    assert "closed" in repr(opened)
    assert repr(other) == "Session(closed)"
    for use in (opened.session, lambda: opened.generate("x"), lambda: opened.stats, other.decode):
        with pytest.raises(qwen_moe.InvalidArgument, match="engine is closed"):
            use()
    other.close()


def test_a_forgotten_session_gives_its_slot_back(engine: qwen_moe.Engine) -> None:
    for _ in range(2 * engine.capacity.max_sessions):
        engine.session().prefill("x")
    gc.collect()
    assert engine.stats["sessions_open"] == 0


# --- Sessions -----------------------------------------------------------------


def test_prefill_appends_and_says_how_much(session: qwen_moe.Session) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="no logits"):
        _ = session.logits
    count = session.prefill("Hello there")
    assert session.prefill([5, 6]) == 2
    assert session.position == count + 2
    assert session.tokens[-2:] == [5, 6]
    assert session.logits.shape == (session.engine.config.vocab_size,)
    assert session.logits.dtype == torch.float32
    assert repr(session) == f"Session(position={count + 2}, max_context=128)"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, -1], "token id -1"),
        ([10**6, 1], "token id 1000000"),
        ([1.5], "token ids"),
        (3, "token ids"),
        ("\ud800", "UTF-8"),
    ],
    ids=repr,
)
def test_a_bad_prompt_is_refused_and_changes_nothing(
    session: qwen_moe.Session, prompt: Any, words: str
) -> None:
    session.prefill([7])
    for call in (session.prefill, session.generate):
        with pytest.raises(qwen_moe.InvalidArgument, match=words):
            call(prompt)
    with pytest.raises(qwen_moe.InvalidArgument, match=f"prompt 1: .*{words}"):
        session.engine.generate(["x", prompt])
    assert session.tokens == [7]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(session: qwen_moe.Session) -> None:
    session.prefill([1] * 100)
    for call in (session.prefill, session.generate):
        with pytest.raises(qwen_moe.CapacityError, match=r"29 tokens.*100.*max_context = 128"):
            call([1] * 29)
    with pytest.raises(qwen_moe.CapacityError, match="28 tokens"):
        session.generate([1] * 28)  # no room for a reply
    session.prefill([1] * 28)
    with pytest.raises(qwen_moe.CapacityError, match="128"):
        session.decode()


def test_an_empty_session_has_nothing_to_continue(session: qwen_moe.Session) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="empty"):
        session.decode()
    with pytest.raises(qwen_moe.InvalidArgument, match="empty"):
        session.generate(None)


def test_decode_and_generate_draw_the_same(session: qwen_moe.Session) -> None:
    whole = list(session.generate(PROMPTS[0], DRAWN))
    assert len({step.token_id for step in whole}) > 5
    session.reset()
    session.prefill(PROMPTS[0])
    singly = [session.decode(DRAWN) for _ in whole]
    assert [s.token_id for s in singly] == [s.token_id for s in whole]
    prompt = session.engine.tokenizer.encode(PROMPTS[0])
    assert session.tokens == prompt + [s.token_id for s in whole]
    # What decode holds back of a character at the end, generate shows as U+FFFD.
    assert joined(whole).rstrip("\ufffd") == joined(singly).rstrip("\ufffd")


def test_generate_in_two_parts_draws_what_it_draws_in_one(session: qwen_moe.Session) -> None:
    whole = [step.token_id for step in session.generate(PROMPTS[0], DRAWN)]
    session.reset()
    first = [s.token_id for s in session.generate(PROMPTS[0], with_(DRAWN, max_tokens=15))]
    rest = [s.token_id for s in session.generate(None, with_(DRAWN, max_tokens=25))]
    assert first + rest == whole


def test_steps_of_a_generation_are_terminal_once_at_its_end(session: qwen_moe.Session) -> None:
    steps = list(session.generate(PROMPTS[0], DRAWN))
    assert [step.is_terminal for step in steps] == [False] * 39 + [True]
    assert session.finish_reason == "length"
    assert joined(steps) == session.engine.tokenizer.decode([s.token_id for s in steps])


def test_a_reply_without_a_limit_ends_with_the_context(session: qwen_moe.Session) -> None:
    steps = list(session.generate([1] * 100, with_(DRAWN, max_tokens=None)))
    assert len(steps) == 28
    assert (steps[-1].is_terminal, session.finish_reason) == (True, "length")
    assert session.position == 128


def test_an_end_of_text_id_ends_the_reply_unless_ignored(without_tokenizer: Path) -> None:
    """Whichever token comes third is made an end-of-text id."""
    with open_tiny(without_tokenizer) as opened:
        (drawn,) = opened.generate([1, 2, 3], DRAWN)
    third = drawn.token_ids[2]
    end = drawn.token_ids.index(third) + 1
    path = without_tokenizer / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(f'{{"eos_token_id": [{third}]}}')
        with open_tiny(without_tokenizer) as opened, opened.session() as session:
            assert opened.eos_token_ids == (third,)
            steps = list(session.generate([1, 2, 3], with_(DRAWN, ignore_eos=False)))
            assert [step.token_id for step in steps] == drawn.token_ids[:end]
            assert (steps[-1].is_eos, steps[-1].is_terminal) == (True, True)
            assert session.finish_reason == "stop"
            assert not any(step.is_eos for step in steps[:-1])
            session.reset()
            steps = list(session.generate([1, 2, 3], DRAWN))
            assert [step.token_id for step in steps] == drawn.token_ids
            assert steps[end - 1].is_eos
            (batched,) = opened.generate([1, 2, 3], with_(DRAWN, ignore_eos=False))
            assert (batched.token_ids, batched.finish_reason) == (drawn.token_ids[:end], "stop")
    finally:
        path.write_text(before)


def test_a_stop_id_ends_the_reply(engine: qwen_moe.Engine, session: qwen_moe.Session) -> None:
    (drawn,) = engine.generate(PROMPTS[0], DRAWN)
    end = drawn.token_ids.index(drawn.token_ids[4]) + 1
    params = with_(DRAWN, stop_token_ids=[drawn.token_ids[4]])
    steps = list(session.generate(PROMPTS[0], params))
    assert [step.token_id for step in steps] == drawn.token_ids[:end]
    assert (steps[-1].is_terminal, session.finish_reason) == (True, "stop")
    (batched,) = engine.generate(PROMPTS[0], params)
    assert (batched.token_ids, batched.finish_reason) == (drawn.token_ids[:end], "stop")


@pytest.mark.parametrize("size", [1, 3, 9])
def test_a_stop_text_cuts_the_reply_alone_and_in_a_batch(
    engine: qwen_moe.Engine, session: qwen_moe.Session, size: int
) -> None:
    replies = engine.generate(PROMPTS, DRAWN)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        middle = len(reply.text) // 2
        stop = reply.text[middle : middle + size]
        params = with_(DRAWN, stop=["\0 not there", stop])
        want = reply.text[: reply.text.index(stop)]
        (batched,) = engine.generate([prompt], params)
        assert batched.text == want
        assert batched.finish_reason == "stop"

        session.reset()
        steps = list(session.generate(prompt, params))
        assert joined(steps) == want
        assert [step.token_id for step in steps] == batched.token_ids
        assert batched.token_ids == reply.token_ids[: len(batched.token_ids)]
        assert len(batched.token_ids) < len(reply.token_ids)
        assert stop in engine.tokenizer.decode(batched.token_ids)
        assert stop not in engine.tokenizer.decode(batched.token_ids[:-1])
        assert (steps[-1].is_terminal, session.finish_reason) == (True, "stop")
        # Nothing was drawn past the text.
        assert session.tokens[-len(steps) :] == batched.token_ids

        session.reset()
        session.prefill(prompt)
        singly = []
        while not (singly and singly[-1].is_terminal):
            singly.append(session.decode(params))
        assert joined(singly) == want


def test_company_never_draws_past_a_stop_text(
    engine: qwen_moe.Engine, session: qwen_moe.Session
) -> None:
    """Another session's steps serve everyone; the one that may stop must not run ahead."""
    (reply,) = engine.generate(PROMPTS[0], DRAWN)
    params = with_(DRAWN, stop=reply.text[len(reply.text) // 2 :][:3])
    (want,) = engine.generate(PROMPTS[0], params)
    steps = session.generate(PROMPTS[0], params)
    drawn = [next(steps)]
    with engine.session() as other:
        list(other.generate(PROMPTS[1], DRAWN))
    drawn += steps
    assert joined(drawn) == want.text
    assert session.tokens[want.prompt_tokens :] == want.token_ids


def test_a_stop_text_that_never_comes_changes_nothing(
    engine: qwen_moe.Engine, session: qwen_moe.Session
) -> None:
    (reply,) = engine.generate(PROMPTS[0], DRAWN)
    # The reply ends in what might have been its beginning.
    params = with_(DRAWN, stop=["\0 not there", reply.text[-2:] + "\0"])
    assert engine.generate(PROMPTS, params) == engine.generate(PROMPTS, DRAWN)
    want = list(session.generate(PROMPTS[0], DRAWN))
    session.reset()
    steps = list(session.generate(PROMPTS[0], params))
    assert [step.token_id for step in steps] == [step.token_id for step in want]
    assert joined(steps) == joined(want)
    assert [step.is_terminal for step in steps] == [step.is_terminal for step in want]


def test_dropping_the_iterator_ends_the_request(session: qwen_moe.Session) -> None:
    steps = session.generate(PROMPTS[0], DRAWN)
    drawn = [next(steps).token_id for _ in range(3)]
    with pytest.raises(qwen_moe.InvalidArgument, match="running"):
        session.prefill("x")  # the request is still there
    steps.close()
    assert session.finish_reason == "stopped"
    assert session.tokens[-3:] == drawn
    session.prefill("x")

    session.reset()
    want = list(session.generate(PROMPTS[0], DRAWN))
    session.reset()
    for count, step in enumerate(session.generate(PROMPTS[0], DRAWN), 1):
        assert step == want[count - 1]
        if count == 5:
            break
    del step
    gc.collect()
    assert [s.token_id for s in session.generate(None, with_(DRAWN, max_tokens=35))] == [
        s.token_id for s in want[5:]
    ]


@pytest.mark.parametrize("stop", [(), ("\0 not there",)], ids=["plain", "stop text"])
def test_stop_between_two_steps_ends_the_iterator(
    session: qwen_moe.Session, stop: tuple[str, ...]
) -> None:
    steps = session.generate(PROMPTS[0], with_(DRAWN, stop=stop))
    next(steps)
    session.stop()
    assert list(steps) == []
    assert session.finish_reason == "stopped"
    # The next request is not stopped by the same call.
    assert len(list(session.generate(None, GREEDY))) == 6


def test_a_prompt_ends_the_text_that_decode_was_in(session: qwen_moe.Session) -> None:
    session.prefill("x")
    session.decode(with_(GREEDY, stop="\0"))
    assert session._detokenizer is not None
    session._detokenizer._held = "held back"
    session.prefill("y")
    assert "held back" not in session.decode(GREEDY).text


def test_log_probabilities_are_those_of_the_model(session: qwen_moe.Session) -> None:
    session.prefill(PROMPTS[0])
    want = torch.log_softmax(session.logits.double(), 0)
    step = session.decode(with_(DRAWN, logprobs=5))
    assert step.logprob == pytest.approx(float(want[step.token_id]), abs=1e-4)
    values, ids = want.topk(5)
    assert [token for token, _ in step.top_logprobs] == ids.tolist()
    assert [value for _, value in step.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    step = session.decode(with_(DRAWN, logprobs=0))
    assert isinstance(step.logprob, float)
    assert step.top_logprobs == ()
    assert session.decode(DRAWN).logprob is None


def test_a_fork_continues_the_text_of_its_origin(session: qwen_moe.Session) -> None:
    """Also when the origin holds half a character back."""
    tokenizer = session.engine.tokenizer
    first, second, third = (
        next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == bytes([byte]))
        for byte in "€".encode()
    )
    session.prefill("x")
    session.decode(GREEDY)
    assert session._detokenizer is not None
    session._detokenizer.push(first)
    session._detokenizer.push(second)
    with session.fork() as fork:
        assert fork._detokenizer is not None
        assert fork._detokenizer.push(third).endswith("€")
        assert session._detokenizer.push(third).endswith("€")


def test_saving_where_it_cannot_be_leaves_nothing(
    session: qwen_moe.Session, tmp_path: Path
) -> None:
    session.prefill("x")
    with pytest.raises(qwen_moe.InvalidArgument, match="nowhere"):
        session.save(tmp_path / "nowhere" / "session")
    (tmp_path / "folder").mkdir()
    with pytest.raises(qwen_moe.InvalidArgument, match="folder"):
        session.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_saving_replaces_a_file_whole(
    engine: qwen_moe.Engine, session: qwen_moe.Session, tmp_path: Path
) -> None:
    path = tmp_path / "session"
    path.write_text("something else")
    session.save(path)  # an empty session is one too
    with engine.restore(path) as restored:
        assert restored.position == 0
    session.prefill("more")
    session.save(path)
    with engine.restore(path) as restored:
        assert restored.tokens == session.tokens
        assert torch.equal(restored.logits, session.logits)
    assert [file.name for file in tmp_path.iterdir()] == ["session"]


@pytest.mark.parametrize("content", [b"", b"{}", b"no session at all " * 9], ids=len)
def test_a_file_that_is_no_session_is_refused(
    engine: qwen_moe.Engine, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(qwen_moe.FormatError, match="x"):
        engine.restore(tmp_path / "x")
    with pytest.raises(qwen_moe.FormatError, match="not a saved session"):
        engine.restore(EMBEDDED / "model.safetensors")


# --- Errors of a step ---------------------------------------------------------


@pytest.fixture(scope="module")
def broken_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken") / "tiny"
    shutil.copytree(EMBEDDED, path)
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][7] = 3e38  # its own row of the tied head overflows
    save_file(tensors, path / "model.safetensors")
    return path


def test_an_error_of_a_step_poisons_the_session_until_reset(broken_path: Path) -> None:
    with open_tiny(broken_path, quantize=None) as opened, opened.session() as session:
        for call in (
            lambda: list(session.generate([1], GREEDY)),
            lambda: session.decode(GREEDY),
            lambda: session.prefill([1]),
            session.fork,
        ):
            with pytest.raises(qwen_moe.Error, match="not finite"):
                call()
        session.reset()
        assert session.prefill([1]) == 1
        assert opened.stats["sessions_open"] == 1


def test_a_failing_prompt_of_a_batch_is_named_and_leaves_no_session(broken_path: Path) -> None:
    with open_tiny(broken_path, quantize=None) as opened:
        with pytest.raises(qwen_moe.Error, match=r"prompt 0.*not finite"):
            opened.generate([[1]], GREEDY)
        assert opened.stats["sessions_open"] == 0


# --- Batches ------------------------------------------------------------------


def test_prompts_may_be_text_or_ids_one_or_many(engine: qwen_moe.Engine) -> None:
    ids = engine.tokenizer.encode(PROMPTS[0])
    (want,) = engine.generate(PROMPTS[0], GREEDY)
    assert want.prompt_tokens == len(ids)
    assert engine.generate(ids, GREEDY) == [want]
    assert engine.generate([PROMPTS[0], ids, tuple(ids)], GREEDY) == [want] * 3
    assert engine.generate([torch.tensor(ids)], GREEDY) == [want]
    assert engine.generate([], GREEDY) == []


def test_every_prompt_may_have_its_own_sampling(engine: qwen_moe.Engine) -> None:
    settings = [
        with_(DRAWN, seed=seed, max_tokens=5 + 9 * seed, logprobs=asked)
        for seed, asked in enumerate([None, 0, 2, None])
    ]
    got = engine.generate(PROMPTS, settings)
    for prompt, params, generation in zip(PROMPTS, settings, got, strict=True):
        assert engine.generate([prompt], params) == [generation]
        assert len(generation.token_ids) == params.max_tokens
        assert generation.finish_reason == "length"
        assert generation.text == engine.tokenizer.decode(generation.token_ids)
    assert got[0].logprobs is None
    assert got[1].logprobs is not None
    assert len(got[1].logprobs) == len(got[1].token_ids)
    assert got[1].top_logprobs is None
    assert got[2].top_logprobs is not None
    assert {len(top) for top in got[2].top_logprobs} == {2}
    with pytest.raises(qwen_moe.InvalidArgument, match="4 prompts and 2"):
        engine.generate(PROMPTS, settings[:2])


def test_a_batch_of_more_prompts_than_sessions_keeps_all_sessions_busy() -> None:
    with open_tiny() as opened:
        params = [with_(DRAWN, max_tokens=count) for count in (30, 3, 3, 3, 3, 3, 3)]
        got = opened.generate(["x"] * 7, params)
        assert [len(generation.token_ids) for generation in got] == [30] + [3] * 6
        # Seven prompts in three sessions: the short ones pass while the long one runs.
        assert opened.stats["sessions_opened"] == 3
        assert opened.stats["decode_steps"] < 30 + 2


def test_a_batch_takes_the_sessions_that_are_free(
    engine: qwen_moe.Engine, session: qwen_moe.Session
) -> None:
    want = engine.generate(PROMPTS, GREEDY)
    with engine.session() as other:
        assert engine.generate(PROMPTS, GREEDY) == want
        with (
            engine.session(),
            pytest.raises(qwen_moe.CapacityError),
        ):
            engine.generate(PROMPTS, GREEDY)
        assert other.position == session.position == 0


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ("", qwen_moe.InvalidArgument, "prompt 2: .*empty"),
        ([1, 10**6], qwen_moe.InvalidArgument, "prompt 2: .*1000000"),
        ([1] * 128, qwen_moe.CapacityError, "prompt 2 has 128 tokens.*max_context = 128"),
    ],
    ids=["empty", "id", "long"],
)
def test_a_bad_prompt_is_refused_before_anything_runs(
    engine: qwen_moe.Engine, bad: Any, error: type[Exception], words: str
) -> None:
    before = engine.stats
    with pytest.raises(error, match=words):
        engine.generate(["x", "y", bad], GREEDY)
    assert engine.stats == before


def test_no_python_runs_for_each_token_of_a_batch(
    engine: qwen_moe.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Counting:
        def __init__(self, core: Any) -> None:
            self._core = core

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self._core, name)

    monkeypatch.setattr(engine, "_core", Counting(engine.core))
    engine.generate(["x", "y"], with_(GREEDY, max_tokens=100))
    assert calls.count("run") <= 2
    assert len(calls) < 20


# --- Without a tokenizer ------------------------------------------------------


def test_without_a_tokenizer_ids_work_and_text_is_refused(without_tokenizer: Path) -> None:
    with open_tiny(without_tokenizer) as opened, open_tiny() as whole, opened.session() as session:
        (got,) = opened.generate([1, 2, 3], DRAWN)
        (want,) = whole.generate([1, 2, 3], DRAWN)
        assert got.token_ids == want.token_ids
        assert got.text == ""
        steps = list(session.generate([1, 2, 3], DRAWN))
        assert [step.token_id for step in steps] == want.token_ids
        assert joined(steps) == ""
        for call in (
            lambda: opened.tokenizer,
            lambda: session.prefill("x"),
            lambda: opened.generate("x"),
            lambda: session.generate([1], with_(GREEDY, stop="x")),
            lambda: opened.generate([1], with_(GREEDY, stop="x")),
        ):
            with pytest.raises(qwen_moe.FormatError, match=r"tokenizer\.json"):
                call()
