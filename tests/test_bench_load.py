"""`benchmarks/bench_load.py` on the smallest shapes: it runs, and its figures agree."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qwen_moe
from qwen_moe.quantize import quantize

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_load.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_a_bundle_and_a_checkpoint(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "load.json"
    shapes = ["--preset", "tiny", "--device", "cpu", "--layers", "2", "--repeat", "1"]
    bench.main([*shapes, "--dir", str(tmp_path), "--json", str(out)])
    assert "share of the slower ceiling" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["load.json"]
    report = json.loads(out.read_text())
    for name in ("bundle", "bfloat16, 2 layers, as int4"):
        found = report[name]
        assert found["share"] == pytest.approx(found["rate"] / found["ceilings"]["read"])
        assert found["rate"] == pytest.approx(found["file_bytes"] / found["weights_seconds"][0])
    # Codes and scales of a bundle are in memory as they are in the files, besides the headers.
    found = report["bundle"]
    assert 0 < found["file_bytes"] - found["resident_bytes"] < 20000


def test_pinned_memory_counts_as_the_hosts(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = [5 << 30]
    monkeypatch.setattr(bench._core, "cuda_pinned_bytes", lambda: pinned[0])
    peaks = bench.Peaks(None)
    with peaks.watched():
        pinned[0] += 3 << 30
    assert 2 << 30 < peaks.host < 4 << 30


def test_a_bundle_of_random_weights_is_what_a_dummy_is(bench: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(bench.preset("tiny", 4)))
    quantize(source, tmp_path / "out", recipe="int4", load_format="dummy")

    def logits(path: Path, **settings: str) -> torch.Tensor:
        with (
            qwen_moe.Engine(
                path, device="cpu", max_sessions=1, max_context=64, **settings
            ) as engine,
            engine.session() as session,
        ):
            session.prefill(list(range(3, 40)))
            return session.logits.clone()

    want = logits(source, quantize="int4", load_format="dummy")
    assert torch.equal(logits(tmp_path / "out"), want)
