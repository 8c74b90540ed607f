"""The tokenizer in the metadata of a GGUF file, for those that split text as Qwen models do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from qwen_moe.errors import FormatError
from qwen_moe.tokenizer import Tokenizer

# How text is cut before byte pairs are merged, by tokenizer.ggml.pre.
_SPLITS = {
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
_ENDS = ("<|im_end|>", "<|endoftext|>")  # both end a reply; the metadata has room for one
_CONTROL, _USER_DEFINED = 3, 4  # token types


def read(metadata: Mapping[str, Any], file: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        FormatError: The metadata has none, or one of another kind.
    """

    def field(name: str) -> Any:  # noqa: ANN401 - whatever the file holds
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise FormatError(
                f"{file}: tokenizer.ggml.{name} is missing in the metadata; put the model's "
                "tokenizer.json beside the file"
            )
        return value

    for name, known in (("model", ("gpt2",)), ("pre", tuple(_SPLITS))):
        if field(name) not in known:
            raise FormatError(
                f"{file}: tokenizer.ggml.{name} is {field(name)!r}; only {', '.join(known)} is "
                "read, so put the model's tokenizer.json beside the file"
            )
    tokens = field("tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in field("merges"))]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise FormatError(f"{file}: the tokenizer in the metadata is broken: {error}") from error
    backend.normalizer = normalizers.NFC()
    split = tokenizers.Regex(_SPLITS[field("pre")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=False)]
    backend.add_special_tokens([_added(token) for token, kind in added if kind == _CONTROL])
    backend.add_tokens([_added(token) for token, kind in added if kind == _USER_DEFINED])
    settings: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for name in ("bos", "eos", "pad"):
        index = metadata.get(f"tokenizer.ggml.{name}{'ding' if name == 'pad' else ''}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            settings[f"{name}_token"] = tokens[index]
    tokenizer = Tokenizer(file, backend=backend, settings=settings)
    control = [vocab[token] for token, kind in added if kind == _CONTROL and token in _ENDS]
    tokenizer.eos_token_ids = tuple(dict.fromkeys((*tokenizer.eos_token_ids, *control)))
    return tokenizer


def _added(token: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, normalized=False)
