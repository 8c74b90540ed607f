"""The command line, in this process but for what only a process of its own can show."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qwen_moe
from qwen_moe import _core, bench
from qwen_moe.__main__ import main
from qwen_moe.chat import next_turn
from qwen_moe.engine import EMBEDDED
from qwen_moe.sampling import recommended

Capture = pytest.CaptureFixture[str]

COMMON = ["--device", "cpu", "--max-context", "256", "--ignore-eos", "--temperature", "0"]
GENERATE = ["generate", *COMMON]
CHAT = ["chat", *COMMON, "--max-tokens", "4"]
TINY_CONFIG = bench.PRESETS["small"] | {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def run(capsys: Capture, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of a command that works."""
    capsys.readouterr()
    status = main(arguments)
    got = capsys.readouterr()
    assert status == 0, got.err
    return got.out, got.err


def refused(capsys: Capture, *arguments: str) -> str:
    """The message of a command that is refused."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as error:  # argparse
        status = int(error.code or 0)
    got = capsys.readouterr()
    assert status == 2
    assert "error: " in got.err
    assert "Traceback" not in got.err
    assert got.out == ""
    return got.err


@pytest.fixture(scope="module")
def engine() -> qwen_moe.Engine:
    return qwen_moe.Engine(device="cpu", max_context=256)


# --- generate -----------------------------------------------------------------


def test_generate_prints_the_reply_and_the_figures_apart(
    capsys: Capture, engine: qwen_moe.Engine
) -> None:
    params = qwen_moe.SamplingParams(max_tokens=12, ignore_eos=True)
    (want,) = engine.generate("Hello there", params)
    out, err = run(capsys, *GENERATE, "Hello there", "--max-tokens", "12")
    assert out == want.text + "\n"
    assert re.search(
        rf"load [\d.]+ s \| prefill {want.prompt_tokens} tokens, [\d.]+ tok/s \| "
        r"decode 12 tokens, [\d.]+ tok/s \| ended by length \| peak memory \d+ MiB",
        err,
    )


def test_generate_passes_every_sampling_flag_on(capsys: Capture, engine: qwen_moe.Engine) -> None:
    settings = {
        "temperature": 1.4,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "seed": 5,
        "max_tokens": 20,
    }
    (whole,) = engine.generate("Hello", qwen_moe.SamplingParams(**settings, ignore_eos=True))
    stop = whole.text[len(whole.text) // 2 :][:2]
    (want,) = engine.generate(
        "Hello", qwen_moe.SamplingParams(**settings, ignore_eos=True, stop=["\0", stop])
    )
    assert want.finish_reason == "stop"
    flags = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    out, err = run(capsys, *GENERATE, "Hello", *flags, "--stop", "\0", "--stop", stop)
    assert out == want.text + "\n"
    assert "ended by stop" in err
    # Each of them matters: without the seed's value another text comes.
    other, _ = run(capsys, *GENERATE, "Hello", *flags, "--seed", "6")
    assert other != whole.text + "\n"


def test_generate_draws_as_the_checkpoint_recommends(
    capsys: Capture, engine: qwen_moe.Engine
) -> None:
    settings = recommended(EMBEDDED)
    assert settings["temperature"] > 0
    params = qwen_moe.SamplingParams(**settings, seed=3, max_tokens=20)
    (want,) = engine.generate("Hello", params)
    flags = ["--device", "cpu", "--max-context", "256", "--seed", "3", "--max-tokens", "20"]
    assert run(capsys, "generate", "Hello", *flags)[0] == want.text + "\n"


def test_generate_reads_a_prompt_from_a_file_or_takes_the_default(
    capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_text("Once upon a time")
    short = ("--max-tokens", "5")
    from_file = run(capsys, *GENERATE, "--prompt-file", str(tmp_path / "prompt"), *short)[0]
    assert from_file == run(capsys, *GENERATE, "Once upon a time", *short)[0]
    assert from_file == run(capsys, *GENERATE, *short)[0]


def test_generate_asks_by_the_chat_template(capsys: Capture, engine: qwen_moe.Engine) -> None:
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    params = qwen_moe.SamplingParams(max_tokens=5, ignore_eos=True)
    (want,) = engine.generate(prompt, params)
    out, err = run(capsys, *GENERATE, "Hi", "--chat", "--max-tokens", "5")
    assert out == want.text + "\n"
    assert f"prefill {want.prompt_tokens} tokens" in err


def test_generate_repeats_after_silent_warm_ups(capsys: Capture) -> None:
    arguments = (*GENERATE, "Hello", "--max-tokens", "4")
    once = run(capsys, *arguments)[0]
    out, err = run(capsys, *arguments, "--warmup", "2", "--num-iters", "3", "--stats")
    assert out == once * 3
    assert err.count("load ") == 1
    assert re.search(r"prefill_steps: 5\n", err), "two warm-ups and three runs"
    assert re.search(r"weights: [\d.]+ MiB", err)


@pytest.mark.parametrize("quantize", ["int8", "int4", "int4-all"])
def test_generate_quantizes(capsys: Capture, quantize: str) -> None:
    flags = (*GENERATE, "Hello", "--max-tokens", "2", "--stats")
    sizes = [
        float(re.search(r"weights: ([\d.]+)", run(capsys, *flags, "--quantize", q)[1])[1])
        for q in ("none", quantize)
    ]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--temperature", "0", "--top-p", "0.5"], "greedy"),
        (["x", "--max-tokens", "0"], "max_tokens"),
        (["x", "--num-iters", "0"], "--num-iters"),
        (["x", "--model", "/nowhere"], "/nowhere is not a directory"),
        (["x", "--prompt-file", "y"], "not both"),
        (["--prompt-file", "/nowhere"], "/nowhere"),
        (["--model", "/nowhere"], "PROMPT"),
        ([""], "empty"),
        (["a " * 300], "max_context = 256"),
        (["x", "--max-context", "1000000"], "max_position_embeddings"),
        (["x", "--device", "tpu"], "tpu"),
        (["x", "--quantize", "int3"], "int3"),
        (["x", "--stop", ""], "stop"),
    ],
    ids=str,
)
def test_generate_refuses_with_one_line(capsys: Capture, arguments: list, words: str) -> None:
    assert words in refused(capsys, *GENERATE, *arguments)


# --- chat ---------------------------------------------------------------------


class Talk:
    """What a conversation with piped lines shows."""

    def __init__(self, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *lines: str, flags: tuple[str, ...] = ()) -> tuple[list[str], str]:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        out, err = run(self._capsys, *CHAT, *flags)
        return out.splitlines(keepends=True), err


@pytest.fixture
def talk(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Talk:
    return Talk(capsys, monkeypatch)


def spied_turns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(position before, text appended) of every turn from now on."""
    turns: list[tuple[int, str]] = []
    real = qwen_moe.Session.generate

    def spy(session: qwen_moe.Session, prompt: str, sampling: object) -> object:
        turns.append((session.position, prompt))
        return real(session, prompt, sampling)

    monkeypatch.setattr(qwen_moe.Session, "generate", spy)
    return turns


def test_each_turn_appends_only_what_is_new(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = spied_turns(monkeypatch)
    talk("Hello", "", "And you?", flags=("--system", "Be kind."))
    assert turns[0] == (
        0,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    position, text = turns[1]
    assert position > 4
    assert text == "<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
    assert len(turns) == 2, "an empty line is no turn"


def test_the_end_token_that_a_reply_drew_is_not_written_twice(engine: qwen_moe.Engine) -> None:
    (end,) = engine.tokenizer.encode("<|im_end|>")
    assert end in engine.eos_token_ids
    with engine.session() as session:
        session.prefill("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes")
        cut = next_turn(engine.tokenizer, session, "And?")
        session.prefill([end])
        ended = next_turn(engine.tokenizer, session, "And?")
    assert cut == "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert ended == cut.removeprefix("<|im_end|>")


def test_a_fork_is_left_by_back_as_if_it_had_not_been(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = spied_turns(monkeypatch)
    _, err = talk("Hello", "Why?", "/back")
    plain = list(turns)
    assert "error: there is nothing to go back to" in err
    turns.clear()
    _, err = talk("Hello", "/fork", "Where?", "/fork", "When, and how?", "/back", "/back", "Why?")
    assert turns[0] == plain[0]
    assert turns[-1] == plain[1]
    assert turns[1][0] == plain[1][0] < turns[2][0]
    assert "copy 2" in err


def test_a_saved_conversation_goes_on_after_load(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = spied_turns(monkeypatch)
    file = str(tmp_path / "talk")
    out, _ = talk("Hello", f"/save {file}", "Why?")
    later, err = talk("Something else", f"/load {file}", "Why?")
    assert turns[3] == turns[1]
    assert out[1:] == later[1:], "the reply after loading"
    assert f"from {file}" in err


def test_loading_again_and_again_takes_no_more_sessions(talk: Talk, tmp_path: Path) -> None:
    file = str(tmp_path / "talk")
    _, err = talk("Hello", f"/save {file}", *[f"/load {file}"] * 20)
    assert "error" not in err


def test_reset_starts_over_and_exit_leaves(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = spied_turns(monkeypatch)
    talk("Hello", "/reset", "Hello", "/exit", "Hello")
    assert len(turns) == 2
    assert turns[0] == turns[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/save", "/save needs a file name"),
        ("/load /nowhere/x", "/nowhere/x"),
        ("/dance", "unknown command /dance"),
        ("word " * 400, "max_context = 256"),
    ],
    ids=["save", "load", "unknown", "long"],
)
def test_an_error_in_a_chat_is_shown_and_the_chat_goes_on(
    talk: Talk, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    turns = spied_turns(monkeypatch)
    _, err = talk("Hello", line, "Still there?")
    assert "error: " in err
    assert words in err
    assert "Still there?" in turns[-1][1]


def test_ctrl_c_stops_the_reply_and_the_chat_goes_on(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = spied_turns(monkeypatch)
    spied = qwen_moe.Session.generate

    def interrupted(session: qwen_moe.Session, prompt: str, sampling: object) -> object:
        steps = spied(session, prompt, sampling)
        yield next(steps)
        if len(turns) == 1:
            raise KeyboardInterrupt
        yield from steps

    monkeypatch.setattr(qwen_moe.Session, "generate", interrupted)
    out, _ = talk("Hello", "Go on")
    assert "[stopped]" in "".join(out)
    assert turns[1][0] > 0
    assert "Go on" in turns[1][1]


# --- bench and info -----------------------------------------------------------


def test_bench_reports_everything_that_makes_a_figure_mean_something(
    capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    arguments = [
        *("bench", "--config", str(tmp_path / "config.json"), "--threads", "1", "--device", "cpu"),
        *("--batch", "1,3", "--prompt-tokens", "70", "--decode-tokens", "4", "--repeat", "2"),
    ]
    out, _ = run(capsys, *arguments, "--json", str(tmp_path / "a"))
    report = json.loads((tmp_path / "a").read_text())
    assert report["machine"]["isa"] == _core.isa()
    assert report["machine"]["threads"] == 1
    assert report["quantize"] == "int4"
    assert report["read_bandwidth"] > 1e8
    assert [row["batch"] for row in report["results"]] == [1, 3]
    rate = report["results"][0]["decode_tokens_per_second"]
    assert report["decode_bandwidth"] == rate * report["weight_bytes_per_token"]
    share = report["share_of_read_bandwidth"]
    shares = [of * report["weight_bytes_per_token"] for of in report["results"][0]["of_read"]]
    assert len(shares) == 2
    assert min(shares) <= share <= max(shares)
    for row in report["results"]:
        assert f"{row['batch']:>5} {row['prefill_tokens_per_second']:>14.1f}" in out
        assert re.fullmatch("[0-9a-f]{64}", row["tokens_sha256"])
    assert f"{share:.0%} of the plain read" in out.splitlines()[-1]
    # The same numbers again, whatever the time it took.
    run(capsys, *arguments, "--json", str(tmp_path / "b"))
    again = json.loads((tmp_path / "b").read_text())
    hashes = [[row["tokens_sha256"] for row in r["results"]] for r in (report, again)]
    assert hashes[0] == hashes[1]


def test_bench_takes_smaller_groups(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"hidden_size": 256}))
    read = {}
    for group in ("64", "32"):
        out, _ = run(
            capsys,
            *("bench", "--config", str(tmp_path / "config.json"), "--threads", "1"),
            *("--device", "cpu", "--batch", "1", "--prompt-tokens", "3", "--decode-tokens", "2"),
            *("--repeat", "1", "--group", group, "--json", str(tmp_path / "a")),
        )
        assert f"quantize int4 in groups of {group} |" in out
        read[group] = json.loads((tmp_path / "a").read_text())["weight_bytes_per_token"]
    assert read["32"] > read["64"], "more scales to read"


def test_bench_counts_the_tokens_that_were_computed_in_the_time(
    monkeypatch: pytest.MonkeyPatch, engine: qwen_moe.Engine
) -> None:
    """With a clock that moves one second at each look."""
    seconds = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(_core, "read_bandwidth", lambda threads, seconds: 4.0)
    reads, (got,) = bench.measure(engine, [3], 10, 5, repeat=2, threads=1)
    assert reads == [4.0] * 4
    assert got.of_read == [3 * 4 / 4.0] * 2
    assert got.prefill_tokens_per_second == 3 * 10
    assert got.decode_tokens_per_second == 3 * 4, "the first token comes from the prefill"
    assert len(got.tokens_sha256) == 64
    assert engine.stats["sessions_open"] == 0


def test_a_token_reads_the_experts_it_is_routed_to_and_one_row_of_the_embedding(
    tmp_path: Path,
) -> None:
    def read(**changes: object) -> tuple[int, int]:
        (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | changes))
        with qwen_moe.Engine(tmp_path, device="cpu", load_format="dummy") as opened:
            slots = _core.plan(opened.config, "none", "bfloat16")
            experts = sum(slot.bytes for slot in slots if ".mlp.experts." in slot.fqn)
            return bench.decode_bytes(opened), experts

    two, experts = read()
    four, _ = read(num_experts_per_tok=4)
    assert four - two == experts * 2 // 8
    tied, _ = read(tie_word_embeddings=True)
    assert two - tied == 64 * 2, "an untied model also reads one row of 64 bf16 values"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--decode-tokens", "1"], "--decode-tokens"),
        (["--batch", "0"], "--batch"),
        (["--batch", "x"], "--batch"),
        (["--config", "/nowhere.json"], "/nowhere.json"),
        (["--preset", "huge"], "huge"),
        (["--preset", "small", "--model", "x"], "not allowed"),
    ],
    ids=str,
)
def test_bench_refuses_with_one_line(capsys: Capture, arguments: list, words: str) -> None:
    assert words in refused(capsys, "bench", *arguments)


def test_info_counts_parameters_and_bytes(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    out, _ = run(capsys, "info", str(tmp_path))
    experts = 2 * 8 * 3 * 64 * 32
    total = int(re.search(r"parameters +([\d,]+)", out)[1].replace(",", ""))
    active = int(re.search(r"\(([\d,]+) active", out)[1].replace(",", ""))
    assert total - active == experts * 6 // 8
    rows = re.findall(r"^(bfloat16|int8|int4|int4-all) +([\d.]+) (KiB|MiB)", out, re.MULTILINE)
    sizes = [float(size) * (1024 if unit == "MiB" else 1) for _, size, unit in rows]
    assert len(sizes) == 4
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] * 1024 == pytest.approx(2 * total, rel=0.05)
    fixed, per_token = _core.session_bytes(qwen_moe.Engine(device="cpu").config, "bfloat16")
    assert (
        f"{fixed / 1024:.1f} KiB, and {per_token / 1024:.1f} KiB for each token"
        in run(capsys, "info", str(EMBEDDED))[0]
    )


def test_info_counts_the_scales_of_smaller_groups(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG | {"hidden_size": 256}))

    def sizes(*arguments: str) -> dict[str, str]:
        out, _ = run(capsys, "info", str(tmp_path), *arguments)
        return dict(re.findall(r"^(bfloat16|int8|int4|int4-all) +([\d.]+ .iB)", out, re.MULTILINE))

    few, many = sizes(), sizes("--group", "32")
    assert few["bfloat16"] == many["bfloat16"]
    for recipe in ("int4", "int4-all"):
        assert float(few[recipe].split()[0]) < float(many[recipe].split()[0])
    assert "32; got 48" in refused(capsys, "info", str(tmp_path), "--group", "48")


def test_info_of_what_is_no_model_is_refused(capsys: Capture, tmp_path: Path) -> None:
    assert "config.json" in refused(capsys, "info", str(tmp_path))


# --- As a process -------------------------------------------------------------


def test_as_a_process_it_streams_replies_and_reports_errors() -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "qwen_moe", *arguments],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    done = call(*GENERATE, "Hello", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "tok/s" in done.stderr
    done = call("generate", "x", "--model", "/nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: /nowhere is not a directory; a checkpoint is a directory with config.json, "
        "or a GGUF file\n"
    )
