"""A session as a file: its state by buffer name, checked bit for bit before it is used.

The file is safetensors. Its metadata holds one JSON text with the format version, what the session
needs of an engine, and a SHA-256 of every buffer; and the SHA-256 of that text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qwen_moe.errors import FormatError, InvalidArgument

if TYPE_CHECKING:
    from qwen_moe.engine import Engine

FORMAT = "qwen_moe.session"
VERSION = 1


def save(engine: Engine, session: int, path: Path) -> None:
    """Write the session to `path`, whole or not at all."""
    position = engine.core.position(session)
    tensors: dict[str, torch.Tensor] = {}
    for fqn, dtype, shape, data in engine.core.export_state(session):
        kind: torch.dtype = getattr(torch, dtype)
        flat = torch.frombuffer(data, dtype=kind) if len(data) else torch.empty(0, dtype=kind)
        tensors[fqn] = flat.view(shape)
    text = json.dumps(
        {
            "version": VERSION,
            **_needs(engine),
            "position": position,
            "sha256": {fqn: _digest(tensor) for fqn, tensor in tensors.items()},
        }
    )
    metadata = {
        "format": FORMAT,
        "session": text,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, draft, metadata)
        draft.replace(path)
    except (SafetensorError, OSError) as error:
        raise InvalidArgument(f"{path}: the session cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def restore(engine: Engine, path: Path) -> int:
    """Open a session of `engine` with the state in `path`, after all of it was checked."""
    buffers = _read(engine, path)
    session = engine.core.open()
    try:
        engine.core.import_state(session, buffers)
    except BaseException as error:
        engine.core.close(session)
        if isinstance(error, FormatError):
            raise FormatError(f"{path}: {error}") from error
        raise
    return session


def _needs(engine: Engine) -> dict[str, str]:
    """What an engine must agree on for a saved session to make sense."""
    return {
        "config": engine.config.hash,
        "checkpoint": engine.fingerprint,
        "recipe": engine.recipe,
        "group": str(engine.group),
        "kv_dtype": engine.kv_dtype,
    }


def _read(engine: Engine, path: Path) -> list[tuple[str, str, list[int], bytearray]]:
    try:
        with safe_open(path, framework="pt") as file:
            facts = _facts(path, file.metadata() or {})
            _check_engine(path, facts, engine)
            names = set(file.keys())
            digests = facts["sha256"]
            if names != set(digests):
                raise FormatError(f"{path}: its buffers are not the ones it lists")
            # The order of saving is the order of the list.
            tensors = {fqn: file.get_tensor(fqn) for fqn in digests}
            for fqn, tensor in tensors.items():
                if _digest(tensor) != digests[fqn]:
                    raise FormatError(f"{path}: buffer {fqn} is damaged: its checksum differs")
            return [
                (
                    fqn,
                    str(tensor.dtype).removeprefix("torch."),
                    list(tensor.shape),
                    bytearray(_bytes(tensor)),
                )
                for fqn, tensor in tensors.items()
            ]
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: {error}") from error


def _facts(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The checked JSON text of the metadata."""
    kind = metadata.get("format")
    if kind != FORMAT:
        raise FormatError(f"{path}: not a saved session: its format is {kind!r}, not {FORMAT!r}")
    text = metadata.get("session", "")
    if hashlib.sha256(text.encode()).hexdigest() != metadata.get("sha256"):
        raise FormatError(f"{path}: its metadata is damaged: the checksum differs")
    facts: dict[str, Any] = json.loads(text)
    if facts["version"] != VERSION:
        raise FormatError(
            f"{path}: saved as version {facts['version']}; this engine reads version {VERSION}"
        )
    return facts


def _check_engine(path: Path, facts: Mapping[str, Any], engine: Engine) -> None:
    for name, here in _needs(engine).items():
        if facts.get(name, here) != here:  # "group" came later
            raise InvalidArgument(
                f"{path}: the session was saved with {name} {facts[name]}, this engine has {here}"
            )


def _digest(tensor: torch.Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
