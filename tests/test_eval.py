"""`qwen-moe eval`: its figures, and the bounds that recipes keep on the embedded checkpoint."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import foreign
import qwen_moe
from qwen_moe.__main__ import main
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.evaluate import Loss, evaluate
from qwen_moe.quantize import quantize
from test_parity import TEXT

# About a third above what was measured: 2.8e-4, 0.026 and 0.031; top-1 0.994, 0.859 and 0.853.
BOUNDS = {"int8": (4e-4, 0.98), "int4": (0.035, 0.82), "int4-all": (0.042, 0.80)}


def ids_of(text: str) -> list[int]:
    return Checkpoint(foreign.TINY).tokenizer().encode(text)


def open_tiny(recipe: str | None = None, context: int = 512) -> qwen_moe.Engine:
    return qwen_moe.Engine(device="cpu", quantize=recipe, max_sessions=1, max_context=context)


def losses(ids: list[int], recipes: list[str], context: int = 512) -> list[Loss]:
    opened = evaluate(open_tiny, open_tiny, ids, recipes, context=context)
    return list(opened)


@pytest.fixture(scope="module")
def measured() -> dict[str, Loss]:
    return {loss.recipe: loss for loss in losses(ids_of(TEXT), list(BOUNDS))}


@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_recipe_loses_no_more_than_its_bound(measured: dict[str, Loss], recipe: str) -> None:
    most_kl, least_same = BOUNDS[recipe]
    loss, reference = measured[recipe], measured["none"]
    assert 1e-6 < loss.kl <= most_kl
    assert least_same <= loss.same_top <= 1
    assert abs(loss.perplexity / reference.perplexity - 1) < 0.05
    assert loss.weight_bytes < reference.weight_bytes


def test_the_reference_is_at_no_distance_from_itself(measured: dict[str, Loss]) -> None:
    assert measured["none"].kl == 0
    assert measured["none"].same_top == 1
    again = losses(ids_of(TEXT)[:20], ["none"])[1]
    assert again.kl == 0


@pytest.mark.parametrize("context", [512, 30])
def test_perplexity_is_that_of_transformers_in_windows(context: int) -> None:
    ids = ids_of(TEXT)[:100]
    model = AutoModelForCausalLM.from_pretrained(foreign.TINY, dtype=torch.float32).eval()
    surprise, count = 0.0, 0
    for begin in range(0, len(ids), context):
        window = torch.tensor(ids[begin : begin + context])
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0]
        surprise += float(F.cross_entropy(logits[:-1], window[1:], reduction="sum"))
        count += len(window) - 1
    (reference,) = losses(ids, [], context)
    assert reference.perplexity == pytest.approx(math.exp(surprise / count), rel=1e-3)


def test_the_command_prints_a_row_for_each_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["eval", "--text", str(text), "--device", "cpu", "--tokens", "24"]
    assert main([*arguments, "--context", "16", "--recipes", "int8", "int4"]) == 0
    out = capsys.readouterr().out
    assert f"24 tokens of {text} in windows of 16" in out
    rows = re.findall(r"^\| (\S+) \| [\d.]+ MiB \| [\d.]+ \| (\S+) \| ([\d.]+) % \|$", out, re.M)
    assert [row[0] for row in rows] == ["reference", "int8", "int4"]
    assert rows[0][1:] == ("0", "100.0")
    assert 0 < float(rows[1][1]) < float(rows[2][1])


def test_a_quantized_checkpoint_is_compared_with_the_one_it_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = foreign.write(
        tmp_path / "gptq", foreign.tiny(), foreign.GPTQ, foreign.gptq(), only=foreign.EXPERTS
    )
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ["eval", str(written.path), "--reference", str(foreign.TINY)]
    assert main([*arguments, "--text", str(text), "--device", "cpu", "--tokens", "40"]) == 0
    row = re.search(r"^\| none \|.*\| (\S+) \| [\d.]+ % \|$", capsys.readouterr().out, re.M)
    assert row is not None
    assert 1e-4 < float(row[1]) < 0.1


def test_a_bundle_is_measured_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    quantize(foreign.TINY, out, recipe="int8")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)

    def rows(*arguments: str) -> list[tuple[str, str, str]]:
        options = ["--text", str(text), "--device", "cpu", "--tokens", "24", *arguments]
        assert main(["eval", *options]) == 0
        found = capsys.readouterr().out
        assert ("--reference PATH" in found) == (arguments == (str(out),))
        return re.findall(r"^\| (\S+) \| [\d.]+ MiB \| ([\d.]+) \| (\S+) \|", found, re.M)

    want = rows("--recipes", "int8")
    assert rows(str(out)) == [("int8", want[1][1], "-")]
    compared = rows(str(out), "--reference", str(foreign.TINY))
    assert compared == [want[0], want[1]]
    assert main(["eval", str(out), "--text", str(text), "--recipes", "int4"]) == 2
    assert "leave --recipes out" in capsys.readouterr().err


def test_smaller_groups_lose_less() -> None:
    def opened(group: int) -> float:
        def open_group(recipe: str | None) -> qwen_moe.Engine:
            return qwen_moe.Engine(
                device="cpu", quantize=recipe, group=group, max_sessions=1, max_context=512
            )

        return list(evaluate(open_tiny, open_group, ids_of(TEXT), ["int4"], context=512))[1].kl

    assert opened(32) < 0.8 * opened(128)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "nowhere.txt"], r"nowhere\.txt"),
        (["--tokens", "1"], "--tokens and --context must be at least 2"),
        (["--context", "1"], "--tokens and --context must be at least 2"),
        (["short"], "1 tokens in windows of 512 say nothing"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" if arguments == ["short"] else TEXT)
    given = ["eval", "--text", str(text), "--device", "cpu"]
    assert main(given + [a for a in arguments if a != "short"]) == 2
    assert re.search(words, capsys.readouterr().err)


def test_another_model_is_no_reference(tmp_path: Path) -> None:
    other = foreign.write(
        tmp_path / "other", foreign.random(num_experts=2), None, foreign.gptq(), only=("nothing",)
    )

    def reference() -> qwen_moe.Engine:
        return qwen_moe.Engine(other.path, device="cpu", max_sessions=1, max_context=64)

    with pytest.raises(qwen_moe.InvalidArgument, match=r"vocabulary of 384.*one of 4096"):
        list(evaluate(reference, open_tiny, [1, 2, 3], ["none"], context=8))
