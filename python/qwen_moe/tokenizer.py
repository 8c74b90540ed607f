"""Text <-> ids, the chat template, and the ids that end a text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders

from qwen_moe.chat_template import ChatTemplate
from qwen_moe.config import load_json, text_config
from qwen_moe.detokenizer import Detokenizer
from qwen_moe.errors import FormatError, InvalidArgument


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class Tokenizer:
    """The tokenizer of a checkpoint.

    Reads tokenizer.json, and where they exist tokenizer_config.json, chat_template.jinja,
    generation_config.json and config.json. Any number of threads may use it.

    Attributes:
        path: The directory, or the file that holds it.
        eos_token_ids: The ids that end a text.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        backend: tokenizers.Tokenizer | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the tokenizer in the directory `path`.

        Args:
            path: The directory.
            backend: Take this one, of the file `path`, instead of reading tokenizer.json.
            settings: What tokenizer_config.json would say beside `backend`.

        Raises:
            FormatError: tokenizer.json is missing, broken, or not byte-level.
        """
        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if backend is not None:
            self._tokenizer, file = backend, self.path
        else:
            self._tokenizer = _read_backend(file)
        if not isinstance(self._tokenizer.decoder, tokenizers.decoders.ByteLevel):
            kind = type(self._tokenizer.decoder).__name__
            raise FormatError(f"{file}: the decoder is {kind}; only ByteLevel is supported")
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token_id for token_id, token in added.items() if token.special}
        self._alphabet = _byte_alphabet()
        self._bytes: dict[int, bytes] = {}
        self._settings = _optional_json(self.path / "tokenizer_config.json") | dict(settings or {})
        self._template = self._open_template()
        self.eos_token_ids = self._eos_token_ids()

    @property
    def vocab_size(self) -> int:
        """Ids that have a token, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def __repr__(self) -> str:
        """Path and size."""
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size})"

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and the end-of-text ids to a directory."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        ends = folder / "generation_config.json"
        for file, held in (
            (folder / "tokenizer_config.json", self._settings),
            (ends, _optional_json(ends) | {"eos_token_id": list(self.eos_token_ids)}),
        ):
            file.write_text(json.dumps(held, indent=2, ensure_ascii=False), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids, none is added.

        Raises:
            InvalidArgument: Not a text, or one with a lone surrogate.
        """
        if not isinstance(text, str):
            raise InvalidArgument(f"expected a text, got {type(text).__name__}")
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidArgument(f"the text cannot be encoded as UTF-8: {error}") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token are empty."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to the text: none for special and for unknown ids."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._look_up(token_id)
        return found

    def detokenizer(self, stop: Sequence[str] = ()) -> Detokenizer:
        """Decode token by token, with special tokens skipped and cut before a stop text."""
        return Detokenizer(self.token_bytes, stop)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **template_kwargs: object,
    ) -> str:
        """Prompt text of a conversation, by the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` each, in order.
            add_generation_prompt: End with the words that open the assistant's reply.
            **template_kwargs: What the template takes, such as `tools` or `enable_thinking`.

        Raises:
            FormatError: The checkpoint has no chat template.
            InvalidArgument: The template refuses the messages.
        """
        if self._template is None:
            raise FormatError(
                f"{self.path}: no chat template, neither chat_template.jinja nor in "
                "tokenizer_config.json"
            )
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, **template_kwargs
        )

    def _look_up(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        try:
            return bytes(self._alphabet[character] for character in token)
        except KeyError:  # an added token, written as it is
            return str(token).encode()

    def _open_template(self) -> ChatTemplate | None:
        file = self.path / "chat_template.jinja"
        source: object
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        else:
            file = self.path / "tokenizer_config.json"
            source = self._settings.get("chat_template")
        if isinstance(source, list):  # the older form of several named templates
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise FormatError(f"{file}: chat_template must be a text, got {type(source).__name__}")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: _content(self._settings.get(name)) for name in names}
        return ChatTemplate(source, str(file), {k: v for k, v in special.items() if v is not None})

    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = read_eos_token_ids(self.path)
        token = _content(self._settings.get("eos_token"))
        if not ids and token is not None:
            found = self._tokenizer.token_to_id(token)
            ids = () if found is None else (found,)
        return ids


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise FormatError(f"{file}: no such file; the checkpoint has no tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise FormatError(f"{file}: {error}") from error


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """End-of-text ids that generation_config.json names, else config.json; () when neither does.

    Raises:
        FormatError: They are not integers.
    """
    for file in (path / "generation_config.json", path / "config.json"):
        raw = _optional_json(file)
        ids = raw.get("eos_token_id", text_config(raw).get("eos_token_id"))
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        for token in listed:
            if isinstance(token, bool) or not isinstance(token, int):
                raise FormatError(f"{file}: eos_token_id must be integers, got {json.dumps(ids)}")
        return tuple(listed)
    return ()


def _optional_json(file: Path) -> dict[str, Any]:
    return load_json(file) if file.is_file() else {}


def _content(token: object) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else None
