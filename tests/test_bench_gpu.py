"""What `qwen-moe bench` measures on a GPU, with a CPU in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import qwen_moe
from qwen_moe import _core, bench, bench_gpu
from qwen_moe.__main__ import main
from test_cli import TINY_CONFIG, refused, run

PLAN = bench_gpu.Plan(
    batches=[1, 3], prompt_tokens=20, decode_tokens=4, repeat=2, long_context=130, prompts=[7, 1100]
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A config, on a machine whose CPU passes for a GPU."""
    monkeypatch.setattr(_core, "cuda_read_bandwidth", lambda device: 1e9, raising=False)
    monkeypatch.setattr(_core, "cuda_device_info", lambda device: {"name": "A GPU"}, raising=False)
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    return tmp_path


def measure(path: Path, plan: bench_gpu.Plan = PLAN) -> dict:
    def another(**settings) -> qwen_moe.Engine:
        return qwen_moe.Engine(
            path, device="cpu", quantize="int4", threads=1, load_format="dummy", **settings
        )

    with another(max_sessions=plan.sessions, max_context=plan.context) as engine:
        figures = bench_gpu.measure(engine, plan, bench.decode_bytes(engine), another)
        assert engine.stats["sessions_open"] == 0
    return figures


def test_every_run_goes_on_where_the_last_one_ended(gpu: Path) -> None:
    figures = measure(gpu)
    one, three = figures["results"]
    assert len(one["ms_per_step_of_runs"]) == len(three["ms_per_step_of_runs"]) == PLAN.repeat
    # Behind the prompt, one drawn token and the untimed turn: 4 tokens in each run of the first
    # session, and 2 where it takes turns.
    assert one["context"] == [21 + 14, 21 + 28 + 4]
    assert three["context"] == [21 + 4, 21 + 28 + 8]  # the third session is only in these
    assert figures["without_graph"]["same_tokens"]
    assert figures["long_context"]["context"] == [131 + 4, 131 + 12]
    assert figures["stats"]["max_decode_rows"] == 3
    assert [row["tokens"] for row in figures["prompts"]["prompts"]] == [7, 1100]
    beside = figures["prompts"]["beside"]
    assert beside["prompt_tokens"] == 1100
    assert len(beside["gaps_ms"]) >= 3, "the sessions waited for the whole prompt"
    assert beside["gap_ms_most"] == max(beside["gaps_ms"])
    rate = 1000 * 3 / three["ms_per_step"]
    assert three["decode_tokens_per_second"] == pytest.approx(rate)
    assert "share_of_floor" not in three
    assert one["floor_ms"] > 1000 * figures["weight_bytes_per_token"] / 1e9
    hashes = [row["tokens_sha256"] for row in figures["results"]]
    assert [row["tokens_sha256"] for row in measure(gpu)["results"]] == hashes


def test_the_command_prints_what_it_measured(
    gpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "resolve_devices", lambda device, devices: ["cuda:0"])
    arguments = [
        *("bench", "--config", str(gpu / "config.json"), "--threads", "1", "--device", "cpu"),
        *("--prompt-tokens", "9", "--decode-tokens", "4", "--repeat", "1"),
    ]
    out, _ = run(
        capsys,
        *arguments,
        "--batch",
        "1,2",
        "--long-context",
        "65",
        "--prompts",
        "70",
        "--json",
        str(gpu / "out"),
    )
    report = json.loads((gpu / "out").read_text())
    assert report["gpu"] == {"name": "A GPU"}
    assert out.startswith("A GPU | cpu | ")
    for row in report["results"]:
        assert f"{row['batch']:>5} {row['ms_per_step']:>9.3f}" in out
    assert "without graphs" in out
    assert "the same tokens" in out
    assert "batch 1 at 70-74 tokens" in out
    assert "beside a prompt of 70 tokens" in out
    assert f"{report['results'][0]['share_of_floor']:.0%} of it reached" in out
    assert "at most 64" in refused(capsys, *arguments, "--batch", "65")


def test_other_tokens_without_graphs_are_an_error(
    gpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bench_gpu.measure

    def measured(*arguments) -> dict:
        figures = whole(*arguments)
        figures["without_graph"]["same_tokens"] = False
        return figures

    monkeypatch.setattr(bench, "resolve_devices", lambda device, devices: ["cuda:0"])
    monkeypatch.setattr(bench_gpu, "measure", measured)
    arguments = [
        *("bench", "--config", str(gpu / "config.json"), "--threads", "1", "--device", "cpu"),
        *("--batch", "1", "--prompt-tokens", "9", "--decode-tokens", "4", "--repeat", "1"),
    ]
    assert main(arguments) == 2
    assert "other tokens" in capsys.readouterr().err


def test_a_long_context_is_for_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--long-context" in refused(capsys, "bench", "--device", "cpu", "--long-context", "9")
    assert "--prompts" in refused(capsys, "bench", "--device", "cpu", "--prompts", "9")
