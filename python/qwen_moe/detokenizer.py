"""Ids -> text, one token at a time.

Byte-level tokens are pieces of UTF-8, so one character may span several of them. What is emitted
never ends in half a character, and all of it together equals decoding the ids at once.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence


class Detokenizer:
    """The text of a growing list of tokens, cut before the first stop text.

    Each push costs time in proportion to that token's own text. Text that may turn out to be the
    beginning of a stop text is held back until that is decided. When several stop texts occur, the
    one that is complete first wins, then the longer one.

    Attributes:
        stopped: A stop text came; nothing is emitted from then on.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        """`token_bytes` gives the bytes of an id, none for ids that are not shown."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Append one token; return the text that is certain now."""
        return self._emit(self._utf8.decode(self._token_bytes(token_id)), last=False)

    def finish(self) -> str:
        """Return what was held back; half a character becomes U+FFFD."""
        return self._emit(self._utf8.decode(b"", final=True), last=True)

    def set_stop(self, stop: Sequence[str]) -> None:
        """Look for other stop texts from the next token on."""
        self._stop = tuple(stop)

    def copy(self) -> Detokenizer:
        """An independent one that continues from the same point."""
        twin = Detokenizer(self._token_bytes, self._stop)
        twin._utf8.setstate(self._utf8.getstate())
        twin._held = self._held
        twin.stopped = self.stopped
        return twin

    def _emit(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if not self._stop:
            self._held = ""
            return text
        cut = self._match(text)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return text[:cut]
        keep = 0 if last else self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _match(self, text: str) -> int | None:
        """Where the stop text begins that is complete first."""
        found = [
            (begin + len(stop), begin) for stop in self._stop if (begin := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop text begins with."""
        longest = 0
        for stop in self._stop:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest
