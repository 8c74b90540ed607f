"""One conversation on an engine: its own tokens and state, isolated from every other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qwen_moe import snapshot
from qwen_moe.closing import Closing
from qwen_moe.errors import CapacityError, Error, InvalidArgument
from qwen_moe.sampling import SamplingParams

if TYPE_CHECKING:
    from qwen_moe import _core
    from qwen_moe.detokenizer import Detokenizer
    from qwen_moe.engine import Engine


@dataclass(frozen=True, slots=True)
class Step:
    """One drawn token.

    Attributes:
        token_id: The token.
        text: What it adds to the text: empty while it ends in half a character or in what may be
            the beginning of a stop text, for special tokens, and without a tokenizer.
        is_eos: It is one of the checkpoint's end-of-text ids.
        is_terminal: The request ends with it.
        logprob: Its log-probability, when asked for.
        top_logprobs: (token id, log-probability) of the likeliest tokens, when asked for.
    """

    token_id: int
    text: str
    is_eos: bool
    is_terminal: bool
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Session(Closing):
    """A timeline of tokens and the state computed from it. `Engine.session` opens one.

    Prompts and drawn tokens are appended at the current position. One thread at a time may drive a
    session; `stop` may come from any thread. An error in the middle of a step poisons the session:
    everything but `reset` and `close` raises until `reset`. A session that is garbage collected
    closes itself.

    Attributes:
        finish_reason: Why the last request ended: "stop" (end of text, stop id or stop text),
            "length" (max_tokens or the context), "stopped" (by `stop` or an abandoned iterator),
            "" before the first.
    """

    def __init__(self, engine: Engine, handle: int) -> None:
        """Sessions come from `Engine.session`, `Engine.restore` and `fork`."""
        self._engine = engine
        self._handle: int | None = handle
        self._detokenizer: Detokenizer | None = None
        self._stop = threading.Event()
        self.finish_reason = ""

    def __del__(self) -> None:
        """Close it, so that a forgotten session does not keep its slot."""
        with contextlib.suppress(Exception):  # half-built, or at the interpreter's end
            self.close()

    def __repr__(self) -> str:
        """Where it is."""
        if self._handle is None or self._engine.closed:
            return "Session(closed)"
        return f"Session(position={self.position}, max_context={self._engine.max_context})"

    @property
    def engine(self) -> Engine:
        """The engine it runs on."""
        return self._engine

    @property
    def position(self) -> int:
        """Tokens in the timeline: where the next one goes."""
        return self._live.position(self._id)

    @property
    def tokens(self) -> list[int]:
        """Ids of the whole timeline, prompts and replies."""
        return self._live.tokens(self._id)

    @property
    def logits(self) -> torch.Tensor:
        """float32 [vocab_size] on the CPU, of the last position computed; a copy.

        That is the last token of the prompt after `prefill`, and the token before the drawn one
        after `decode`: the logits it was drawn from. After `generate` it may be the token that
        ended the reply: a GPU has computed it before the engine knew that it was the last.

        Raises:
            InvalidArgument: Nothing was computed yet.
        """
        logits = torch.empty(self._engine.config.vocab_size, dtype=torch.float32)
        self._live.logits(self._id, logits.numpy().data)
        return logits

    def prefill(self, prompt: str | Sequence[int]) -> int:
        """Append a prompt, text or ids, and compute it. Returns how many tokens it has.

        Raises:
            InvalidArgument: The prompt is empty, or an id is outside the vocabulary.
            CapacityError: It does not fit in max_context.
        """
        ids = self._checked(prompt)
        self._stop.clear()
        self._detokenizer = None
        self._submit(ids, SamplingParams(), None, 0)
        try:
            self._live.run([self._id])
            stopped = self._poll().finish_reason == "stopped"
        finally:
            self._cancel()
        self.finish_reason = "stopped" if stopped else ""
        return len(ids)

    def decode(self, sampling: SamplingParams | None = None) -> Step:
        """Draw one token and append it.

        Every call continues the text of the one before, so characters and stop texts may span
        calls. `max_tokens` is not used. Without a seed each call draws its own.

        Raises:
            InvalidArgument: The session is empty.
            CapacityError: The context is full.
        """
        params = sampling or SamplingParams()
        if self._detokenizer is None:
            self._detokenizer = self._engine.detokenizer(params.stop_texts)
        elif params.stop_texts:
            self._detokenizer.set_stop(params.stop_texts)
        self._stop.clear()
        self._submit([], params, params.to_core(), 1)
        try:
            self._live.run([self._id], tokens=1)
            progress = self._poll()
        finally:
            self._cancel()
        if not progress.token_ids:
            raise Error("the session was stopped before a token was drawn")
        full = self.position >= self._engine.max_context
        ended = progress.finish_reason == "stop" or full
        self.finish_reason = progress.finish_reason if ended else ""
        return self._steps(progress, self._detokenizer, ended=ended)[0]

    def generate(
        self, prompt: str | Sequence[int] | None, sampling: SamplingParams | None = None
    ) -> Iterator[Step]:
        """Append a prompt and draw tokens, one step each, as they come.

        With None as the prompt the timeline goes on from where it is. Dropping the iterator ends
        the request; the tokens that were drawn stay in the timeline. So does `stop`, after which
        the iterator ends with no further step.

        Raises:
            InvalidArgument: The prompt is empty, or an id is outside the vocabulary.
            CapacityError: The prompt and one token do not fit in max_context.
        """
        params = sampling or SamplingParams()
        ids = [] if prompt is None else self._checked(prompt)
        room = self._engine.max_context - self.position - len(ids)
        if room < 1:
            raise CapacityError(
                f"the prompt has {len(ids)} tokens and the session {self.position}; with one more "
                f"they do not fit max_context = {self._engine.max_context}"
            )
        if prompt is None and self.position == 0:
            raise InvalidArgument("nothing to continue: the session is empty")
        detokenizer = self._engine.detokenizer(params.stop_texts)
        return self._stream(ids, params, min(room, params.max_tokens or room), detokenizer)

    def stop(self) -> None:
        """End the running request at the next token boundary. From any thread; never waits."""
        self._stop.set()
        self._live.stop(self._id)

    def reset(self) -> None:
        """Forget everything; also ends a request and heals a poisoned session."""
        self._live.reset(self._id)
        self._detokenizer = None
        self.finish_reason = ""

    def fork(self) -> Session:
        """A copy that goes its own way from here. Computed context is shared, not copied.

        Raises:
            CapacityError: No session is free.
        """
        copy = Session(self._engine, self._live.fork(self._id))
        copy._detokenizer = self._detokenizer and self._detokenizer.copy()
        copy.finish_reason = self.finish_reason
        return copy

    def save(self, path: str | Path) -> None:
        """Write the session to a file that `Engine.restore` opens, replacing it whole."""
        snapshot.save(self._engine, self._id, Path(path))

    def close(self) -> None:
        """Give its slot back. Closing twice is fine."""
        handle, self._handle = self._handle, None
        if handle is not None and not self._engine.closed:
            self._engine.core.close(handle)

    @property
    def _id(self) -> int:
        if self._handle is None:
            raise InvalidArgument("the session is closed")
        return self._handle

    @property
    def _live(self) -> _core.Engine:
        if self._handle is None:
            raise InvalidArgument("the session is closed")
        return self._engine.core

    def _checked(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of a prompt that fits behind the timeline."""
        ids = self._engine.prompt_ids(prompt)
        if self.position + len(ids) > self._engine.max_context:
            raise CapacityError(
                f"the prompt has {len(ids)} tokens and the session {self.position}; together they "
                f"do not fit max_context = {self._engine.max_context}"
            )
        return ids

    def _submit(
        self, ids: list[int], params: SamplingParams, sampling: _core.Sampling | None, tokens: int
    ) -> None:
        self._live.submit(
            self._id,
            ids,
            sampling=sampling,
            max_tokens=tokens,
            stop_token_ids=params.stop_token_ids,
            ignore_eos=params.ignore_eos,
        )
        if self._stop.is_set():  # it came just before the request
            self._live.stop(self._id)

    def _poll(self) -> _core.Progress:
        progress = self._live.poll(self._id)
        if progress.finish_reason == "error":
            raise Error(progress.error)
        if progress.finished:
            self.finish_reason = progress.finish_reason
        return progress

    def _cancel(self) -> None:
        """End what is still running: after Ctrl-C, or when an iterator is dropped."""
        if self._handle is not None and not self._engine.closed:
            self._live.cancel(self._id)

    def _stream(
        self, ids: list[int], params: SamplingParams, tokens: int, detokenizer: Detokenizer
    ) -> Iterator[Step]:
        # With stop texts every token is a request of its own: whoever else steps the engine can
        # then never draw past the stop text. A draw depends on seed and position, so the tokens are
        # the same.
        single = bool(params.stop_texts)
        sampling = params.to_core()
        self._stop.clear()
        self._detokenizer = detokenizer
        self._submit(ids, params, sampling, 1 if single else tokens)
        left = tokens
        try:
            while True:
                self._live.run([self._id], tokens=1)
                progress = self._poll()
                left -= len(progress.token_ids)
                more = single and progress.finish_reason == "length" and left > 0
                ended = progress.finished and not more
                for step in self._steps(progress, detokenizer, ended=ended):
                    yield step
                    if step.is_terminal:
                        return
                if ended:
                    return
                if progress.finished:
                    self._submit([], params, sampling, 1)
        except GeneratorExit:
            self.finish_reason = "stopped"
            raise
        finally:
            self._cancel()

    def _steps(
        self, progress: _core.Progress, detokenizer: Detokenizer, *, ended: bool
    ) -> list[Step]:
        """The steps of what came; `ended` says that the request ends with the last of them."""
        steps = []
        count = len(progress.token_ids)
        for index, token in enumerate(progress.token_ids):
            text = detokenizer.push(token)
            last = ended and index == count - 1
            if last:
                text += detokenizer.finish()
            if detokenizer.stopped:
                self.finish_reason = "stop"
            steps.append(
                Step(
                    token_id=token,
                    text=text,
                    is_eos=token in self._engine.eos_token_ids,
                    is_terminal=last or detokenizer.stopped,
                    logprob=progress.logprobs[index] if progress.logprobs else None,
                    top_logprobs=(
                        tuple(progress.top_logprobs[index]) if progress.top_logprobs else ()
                    ),
                )
            )
        return steps
