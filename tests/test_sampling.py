"""SamplingParams refuses what cannot work, and hands the rest to the core as it is."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

import qwen_moe
from qwen_moe import SamplingParams, _core
from qwen_moe.sampling import recommended


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.01),
        ("min_p", 1),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", True),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop", ""),
        ("stop", ["end", ""]),
        ("stop", [3]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["2"]),
        ("ignore_eos", 1),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match=setting):
        SamplingParams(**{"temperature": 1.0, setting: value})


@pytest.mark.parametrize("ignored", [{"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_greedy_refuses_settings_that_it_would_ignore(ignored: dict) -> None:
    (name,) = ignored
    with pytest.raises(qwen_moe.InvalidArgument, match=rf"greedy and ignores {name}"):
        SamplingParams(**ignored)
    assert SamplingParams(temperature=0.5, **ignored)


def test_greedy_takes_everything_that_still_matters() -> None:
    SamplingParams(top_k=1, repetition_penalty=1.2, presence_penalty=-1, seed=3, logprobs=20)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(TypeError, match="top_q"):
        SamplingParams(top_q=0.5)


def test_settings_cannot_change_afterwards() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 1.0


def test_stop_takes_one_text_or_several() -> None:
    assert SamplingParams(stop="end").stop_texts == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_texts == ("a", "b")
    assert SamplingParams().stop_texts == ()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What reaches the core."""
    calls: list[dict] = []
    monkeypatch.setattr(_core, "Sampling", lambda **settings: calls.append(settings))
    return calls


def test_the_core_gets_every_setting_unchanged(given: list[dict]) -> None:
    settings = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.2,
        "seed": 2**64 - 1,
        "logprobs": 3,
    }
    SamplingParams(**settings).to_core()
    SamplingParams().to_core()
    assert given[0] == settings
    assert given[1]["logprobs"] == -1, "no log-probabilities were asked for"


def test_without_a_seed_every_request_draws_its_own(given: list[dict]) -> None:
    params = SamplingParams(temperature=1.0)
    for _ in range(3):
        params.to_core()
    assert len({call["seed"] for call in given}) == 3
    assert all(0 <= call["seed"] < 2**64 for call in given)


def test_the_core_accepts_the_edges_of_every_range() -> None:
    SamplingParams(
        temperature=1e-4,
        top_k=2**31 - 1,
        top_p=1e-6,
        min_p=0.999,
        seed=2**64 - 1,
        logprobs=20,
        repetition_penalty=1e-3,
    ).to_core()


def test_recommended_settings_come_from_generation_config(tmp_path: Path) -> None:
    assert recommended(tmp_path) == {}
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 0.7, "top_k": 20, "eos_token_id": 3}')
    assert recommended(tmp_path) == {"temperature": 0.7, "top_k": 20}
    file.write_text('{"do_sample": false, "temperature": 0.7, "repetition_penalty": 1.1}')
    assert recommended(tmp_path) == {"repetition_penalty": 1.1}
    file.write_text('{"do_sample": true, "temperature": -1}')
    with pytest.raises(qwen_moe.FormatError, match=r"generation_config\.json: temperature"):
        recommended(tmp_path)
