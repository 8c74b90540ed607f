"""Many prompts at once: as many sessions as are free, kept full until every prompt is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qwen_moe.errors import CapacityError, Error, InvalidArgument
from qwen_moe.sampling import SamplingParams

if TYPE_CHECKING:
    from qwen_moe import _core
    from qwen_moe.engine import Engine

# With stop texts somebody has to look at the text; so many tokens are drawn before each look.
LOOK_EVERY = 16


@dataclass(frozen=True, slots=True)
class Generation:
    """The reply to one prompt.

    Attributes:
        text: The reply, cut before a stop text; empty without a tokenizer.
        token_ids: Its tokens, up to and with the one that ended it.
        finish_reason: "stop" (end of text, stop id or stop text), "length" (max_tokens or the
            context) or "stopped".
        prompt_tokens: Tokens of the prompt.
        logprobs: One log-probability for each of `token_ids`; None when not asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens at each of `token_ids`;
            None when not asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(slots=True)
class _Request:
    index: int
    ids: list[int]
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str = ""


def generate(
    engine: Engine,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
) -> list[Generation]:
    """See `Engine.generate`."""
    waiting = deque(_requests(engine, prompts, sampling))
    done: list[Generation | None] = [None] * len(waiting)
    core = engine.core
    sessions = _open(core, min(len(waiting), engine.capacity.max_sessions))
    try:
        active: dict[int, _Watched] = {}
        for session in sessions:
            active[session] = _submit(engine, session, waiting.popleft())
        while active:
            looking = any(watched.request.params.stop_texts for watched in active.values())
            core.run(list(active), tokens=LOOK_EVERY if looking else 0, any=True)
            for session, watched in list(active.items()):
                if not watched.take(core.poll(session)):
                    continue
                done[watched.request.index] = watched.generation()
                del active[session]
                if waiting:
                    core.reset(session)
                    active[session] = _submit(engine, session, waiting.popleft())
    finally:
        for session in sessions:
            core.close(session)
    return [generation for generation in done if generation is not None]


class _Watched:
    """A running request and what it has produced."""

    def __init__(self, engine: Engine, request: _Request) -> None:
        self.request = request
        self._engine = engine
        self._text = ""
        self._detokenizer = (
            engine.detokenizer(request.params.stop_texts) if request.params.stop_texts else None
        )

    def take(self, progress: _core.Progress) -> bool:
        """Add what came since the last look; true when the request is over."""
        request = self.request
        if progress.finish_reason == "error":
            raise Error(f"prompt {request.index}: {progress.error}")
        ids = progress.token_ids
        if self._detokenizer is not None:
            for count, token in enumerate(ids, 1):
                self._text += self._detokenizer.push(token)
                if self._detokenizer.stopped:
                    ids = ids[:count]
                    break
            if progress.finished:
                self._text += self._detokenizer.finish()
        request.token_ids += ids
        request.logprobs += progress.logprobs[: len(ids)]
        request.top_logprobs += progress.top_logprobs[: len(ids)]
        request.finish_reason = progress.finish_reason
        if self._detokenizer is not None and self._detokenizer.stopped:
            request.finish_reason = "stop"
        return request.finish_reason != ""

    def generation(self) -> Generation:
        request = self.request
        asked = request.params.logprobs
        text = self._text if self._detokenizer else self._engine.text_of(request.token_ids)
        return Generation(
            text=text,
            token_ids=request.token_ids,
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.ids),
            logprobs=None if asked is None else request.logprobs,
            top_logprobs=request.top_logprobs if asked else None,
        )


def _requests(
    engine: Engine,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
) -> list[_Request]:
    """Every prompt, checked, with its settings."""
    listed = _listed(prompts)
    if sampling is None or isinstance(sampling, SamplingParams):
        settings = [sampling or SamplingParams()] * len(listed)
    else:
        settings = list(sampling)
    if len(settings) != len(listed):
        raise InvalidArgument(f"got {len(listed)} prompts and {len(settings)} sampling settings")
    requests = []
    for index, (prompt, params) in enumerate(zip(listed, settings, strict=True)):
        try:
            ids = engine.prompt_ids(prompt)
        except InvalidArgument as error:
            raise InvalidArgument(f"prompt {index}: {error}") from error
        if len(ids) >= engine.max_context:
            raise CapacityError(
                f"prompt {index} has {len(ids)} tokens; with one more it does not fit "
                f"max_context = {engine.max_context}"
            )
        if params.stop_texts:
            engine.detokenizer(params.stop_texts)  # raises when there is no tokenizer
        requests.append(_Request(index, ids, params))
    return requests


def _listed(
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
) -> list[str | Sequence[int]]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]


def _open(core: _core.Engine, count: int) -> list[int]:
    """Up to `count` sessions: fewer when others hold some, but at least one."""
    sessions: list[int] = []
    try:
        while len(sessions) < count:
            sessions.append(core.open())
    except CapacityError:
        if not sessions:
            raise
    except BaseException:
        for session in sessions:
            core.close(session)
        raise
    return sessions


def _submit(engine: Engine, session: int, request: _Request) -> _Watched:
    params = request.params
    room = engine.max_context - len(request.ids)
    engine.core.submit(
        session,
        request.ids,
        sampling=params.to_core(),
        max_tokens=min(room, params.max_tokens or room),
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )
    return _Watched(engine, request)
