"""How tokens are drawn: checked, documented settings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_moe import _core
from qwen_moe.config import load_json
from qwen_moe.errors import FormatError, InvalidArgument

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends.

    The defaults are greedy; `SamplingParams(**recommended(path))` takes what a checkpoint's
    generation_config.json asks for. The draw at a position depends on the seed, the position and
    the logits alone, so the same seed gives the same tokens whatever else the engine runs.

    Attributes:
        temperature: 0 takes the likeliest token (greedy); above 0 divides the logits.
        top_k: Draw among the k likeliest tokens; 0 is off.
        top_p: Draw among the likeliest tokens that together reach this probability; 1 is off.
        min_p: Drop tokens less likely than this share of the likeliest; 0 is off.
        repetition_penalty: Above 1 makes tokens of the prompt and the reply less likely; 1 is off.
        presence_penalty: Subtracted from the logits of tokens that the reply holds; 0 is off.
        frequency_penalty: Subtracted once for every time the reply holds the token; 0 is off.
        seed: In [0, 2**64). None takes a fresh random one for each request.
        max_tokens: Most tokens to draw. None goes on until the context is full.
        stop: Texts that end the reply; the reply is cut before them.
        stop_token_ids: Tokens that end the reply, besides the checkpoint's end-of-text ids.
        ignore_eos: Draw on past end-of-text ids.
        logprobs: None for none, 0 for the log-probability of each drawn token, n (at most 20) also
            for the n likeliest tokens. They are those of the model, before temperature and cuts.

    Raises:
        InvalidArgument: A value is out of range, or settings contradict each other.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every setting; keep `stop` and `stop_token_ids` as tuples."""
        _number("temperature", self.temperature, lambda value: value >= 0, "0 or more")
        _number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        _number("min_p", self.min_p, lambda value: 0 <= value < 1, "at least 0 and below 1")
        _number("repetition_penalty", self.repetition_penalty, lambda value: value > 0, "above 0")
        _number("presence_penalty", self.presence_penalty, lambda value: True, "finite")
        _number("frequency_penalty", self.frequency_penalty, lambda value: True, "finite")
        _integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidArgument(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        object.__setattr__(self, "stop", _stop_texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_ids(self.stop_token_ids))
        self._check_contradictions()

    def _check_contradictions(self) -> None:
        if self.temperature > 0:
            return
        idle = [
            f"{name}={value}"
            for name, value, on in (
                ("top_k", self.top_k, self.top_k > 1),
                ("top_p", self.top_p, self.top_p < 1),
                ("min_p", self.min_p, self.min_p > 0),
            )
            if on
        ]
        if idle:
            raise InvalidArgument(
                f"temperature is 0, which is greedy and ignores {', '.join(idle)}; "
                "set a temperature above 0 or leave them out"
            )

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)

    def to_core(self) -> _core.Sampling:
        """What the core's sampler reads; draws a random seed when `seed` is None."""
        seed = int.from_bytes(os.urandom(8), "little") if self.seed is None else self.seed
        return _core.Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )


def recommended(path: str | Path) -> dict[str, Any]:
    """Settings of SamplingParams that a checkpoint recommends; {} when it recommends none.

    Raises:
        FormatError: generation_config.json is broken, or a setting in it is out of range.
    """
    file = Path(path) / "generation_config.json"
    raw = load_json(file) if file.is_file() else {}
    names = ["repetition_penalty"]
    if raw.get("do_sample"):
        names += ["temperature", "top_k", "top_p", "min_p"]
    settings = {name: raw[name] for name in names if raw.get(name) is not None}
    try:
        SamplingParams(**settings)
    except InvalidArgument as error:
        raise FormatError(f"{file}: {error}") from error
    return settings


def _number(name: str, value: object, valid: Callable[[float], bool], allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgument(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not valid(value):
        raise InvalidArgument(f"{name} must be {allowed}, got {value}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"{name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise InvalidArgument(f"{name} must be in [{low}, {high}], got {value}")


def _stop_texts(stop: str | Iterable[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str):
            raise InvalidArgument(f"stop must hold texts, got {text!r}")
        if not text:
            raise InvalidArgument("stop holds an empty text, which would end every reply at once")
    return texts


def _stop_ids(ids: Iterable[int]) -> tuple[int, ...]:
    checked = tuple(ids)
    for token in checked:
        _integer("every one of stop_token_ids", token, 0, 2**31 - 1)
    return checked
