"""Writing the files of a bundle: a directory that appears whole or not at all.

Everything goes to `OUT.partial`, which has no manifest until the end and so opens as nothing. It is
renamed once all of it is on the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from qwen_moe import _core
from qwen_moe.bundle import MANIFEST
from qwen_moe.errors import InvalidArgument

SHARD_BYTES = 4 << 30
_MARK = ".qwen_moe_partial"  # says that what lies beside it may be removed


class ShardWriter:
    """Safetensors files whose tensors are written one after the other.

    All sizes are known beforehand, so a file's header is written first and nothing is kept.
    """

    def __init__(self, path: Path, slots: Sequence[_core.TensorSlot]) -> None:
        """Share the tensors out among files of about `SHARD_BYTES` in `path`."""
        self.path = path
        self._shards: list[list[_core.TensorSlot]] = [[]]
        size = 0
        for slot in slots:
            if self._shards[-1] and size + slot.bytes > SHARD_BYTES:
                self._shards.append([])
                size = 0
            self._shards[-1].append(slot)
            size += slot.bytes
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file that is open."""
        if self._file is not None:
            self._file.close()

    def open_each(self) -> Iterator[tuple[str, _core.TensorSlot]]:
        """(file name, tensor) in order; `write` takes the tensor's bytes before the next."""
        for index, slots in enumerate(self._shards):
            name = f"packed-{index + 1:05}-of-{len(self._shards):05}.safetensors"
            with (self.path / name).open("xb") as file:
                self._file = file
                file.write(_header(slots))
                for slot in slots:
                    yield name, slot
                sync(file)

    def write(self, data: memoryview) -> None:
        """Bytes of the tensor that `open_each` gave last."""
        assert self._file is not None
        self._file.write(data)


def _header(slots: Sequence[_core.TensorSlot]) -> bytes:
    entries: dict[str, object] = {}
    begin = 0
    for slot in slots:
        end = begin + slot.bytes
        entries[slot.fqn] = {"dtype": "U8", "shape": [slot.bytes], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def sync(file: BinaryIO) -> None:
    """Wait for a file to be on the disk; a full one may say so only now."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def appearing(out: Path, *, replace: bool) -> Iterator[Path]:
    """A directory to fill that becomes `out` at the end, or is removed after an error.

    Args:
        out: What must not be there yet.
        replace: A bundle at `out` may be there, and is replaced.

    Raises:
        InvalidArgument: `out` is there, another process writes it, or the disk is full.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - Path.resolve would follow a link
    check_free(out, replace=replace)
    partial = out.with_name(out.name + ".partial")
    try:
        with _locked(partial, out):
            try:
                yield partial
                (partial / _MARK).unlink()
                _rename(partial, out, replace=replace)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise InvalidArgument(f"{out}: the bundle cannot be written: {error}") from error


def check_free(out: Path, *, replace: bool) -> None:
    """Nothing is at `out`, or with `replace` a bundle or an empty directory.

    Raises:
        InvalidArgument: Something is.
    """
    if not os.path.lexists(out):
        return
    if not replace:
        raise InvalidArgument(f"{out}: it is there already; --force replaces a bundle")
    if out.is_symlink() or not out.is_dir():
        raise InvalidArgument(f"{out}: --force replaces a bundle, and this is no directory")
    if not (out / MANIFEST).is_file() and any(out.iterdir()):
        raise InvalidArgument(f"{out}: --force replaces a bundle, and this directory is none")


@contextlib.contextmanager
def _locked(partial: Path, out: Path) -> Iterator[None]:
    """An empty directory that this process alone fills; what a killed one left is removed."""
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # locked by another process, or renamed by it meanwhile
            raise InvalidArgument(f"{out}: another process is writing it")
        left = list(partial.iterdir())
        if left and not (partial / _MARK).is_file():
            raise InvalidArgument(f"{partial}: it is there already, and not from a run before")
        for file in left:
            file.unlink()
        (partial / _MARK).touch()
        yield
    finally:
        os.close(handle)


def _rename(partial: Path, out: Path, *, replace: bool) -> None:
    check_free(out, replace=replace)
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.replace(old)
    try:
        partial.replace(out)
    except OSError:
        if old.exists():
            old.replace(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
