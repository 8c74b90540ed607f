"""`qwen-moe chat`: a conversation on one session, which only ever sees what is new."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_moe.engine import Engine
from qwen_moe.errors import Error, FormatError, InvalidArgument
from qwen_moe.sampling import SamplingParams
from qwen_moe.session import Session
from qwen_moe.tokenizer import Tokenizer

HELP = """Commands:
  /fork         go on in a copy of the conversation; the original waits
  /back         drop the copy and go on where it was forked
  /save FILE    write the conversation's state to FILE
  /load FILE    go on with a saved one
  /reset        start over
  /exit         leave; so does Ctrl-D
Ctrl-C ends the reply."""

_REPLY = "\ufffcreply\ufffc"  # stands for the reply that the session already holds


class Chat:
    """A stack of sessions: the last one is talked to, those before it wait for /back."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        *,
        system: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a first, empty session."""
        self._engine = engine
        self._params = params
        self._system = system
        self._options = dict(template_options or {})
        self._sessions = [engine.session()]

    def run(self) -> None:
        """Read lines until there are no more; reply to each on stdout."""
        for line in _lines():
            words = line.strip()
            if words == "/exit":
                return
            try:
                if words.startswith("/"):
                    self._command(words)
                elif words:
                    self._reply(words)
            except Error as error:
                print(f"error: {error}", file=sys.stderr)

    @property
    def _session(self) -> Session:
        return self._sessions[-1]

    def _reply(self, words: str) -> None:
        text = next_turn(self._engine.tokenizer, self._session, words, self._system, self._options)
        steps = self._session.generate(text, self._params)
        try:
            for step in steps:
                print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print(flush=True)

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name in ("/save", "/load"):
            if not argument:
                raise InvalidArgument(f"{name} needs a file name")
            self._save(Path(argument)) if name == "/save" else self._load(Path(argument))
        elif name == "/fork":
            self._sessions.append(self._session.fork())
            self._say(f"this is copy {len(self._sessions) - 1}; /back returns to the original")
        elif name == "/back":
            if len(self._sessions) == 1:
                raise InvalidArgument("there is nothing to go back to; /fork makes a copy")
            self._sessions.pop().close()
            self._say(f"back at {self._session.position} tokens")
        elif name == "/reset":
            self._session.reset()
            self._say("a new conversation")
        elif name == "/help":
            self._say(HELP)
        else:
            raise InvalidArgument(f"unknown command {name}; /help lists them")

    def _save(self, path: Path) -> None:
        self._session.save(path)
        self._say(f"saved {self._session.position} tokens to {path}")

    def _load(self, path: Path) -> None:
        restored = self._engine.restore(path)
        self._sessions.pop().close()
        self._sessions.append(restored)
        self._say(f"loaded {restored.position} tokens from {path}")

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr)


def next_turn(
    tokenizer: Tokenizer,
    session: Session,
    words: str,
    system: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """What to append to the session so that the model replies to `words`.

    At the beginning that is the rendered conversation. Later it is what the chat template writes
    after the assistant's last reply, less the end-of-text token that the reply itself drew.
    """
    options = options or {}
    turn = {"role": "user", "content": words}
    if session.position == 0:
        opening = [] if system is None else [{"role": "system", "content": system}]
        return tokenizer.apply_chat_template([*opening, turn], **options)
    held = [{"role": "user", "content": "."}, {"role": "assistant", "content": _REPLY}]
    _, found, rest = tokenizer.apply_chat_template([*held, turn], **options).partition(_REPLY)
    if not found:
        raise FormatError("the chat template does not show replies; it cannot continue a session")
    last = session.tokens[-1]
    if last in tokenizer.eos_token_ids:
        rest = rest.removeprefix(tokenizer.decode([last], skip_special_tokens=False))
    return rest


def _lines() -> Iterator[str]:
    """Lines of stdin, with a prompt on a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves", file=sys.stderr)
