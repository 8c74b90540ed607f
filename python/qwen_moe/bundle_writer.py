"""Writing the files of a bundle: a directory that appears whole or not at all.

Everything goes to `OUT.partial`, which has no manifest until the end and so opens as nothing. It is
renamed once all of it is on the disk. What a run that was interrupted has left there is checked and
kept by the next one that writes the same bundle.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qwen_moe import _core
from qwen_moe.bundle import MANIFEST
from qwen_moe.closing import Closing
from qwen_moe.errors import InvalidArgument

SHARD_BYTES = 4 << 30
PIECE_BYTES = 16 << 20
# What is being written, then a line for every tensor that was. Its being there says that what lies
# beside it may be removed.
_JOURNAL = ".qwen_moe_partial"


class ShardWriter(Closing):
    """Safetensors files whose tensors are written one after the other.

    All sizes are known beforehand, so a file's header is written first and nothing is kept.
    """

    def __init__(
        self, path: Path, slots: Sequence[_core.TensorSlot], job: Mapping[str, Any]
    ) -> None:
        """Share the tensors out among files of about `SHARD_BYTES` in `path`.

        Args:
            path: The directory, with what an earlier run may have left.
            slots: Every tensor.
            job: What makes two runs write the same bytes; another one's are written over.
        """
        self.path = path
        self._shards: list[list[_core.TensorSlot]] = [[]]
        size = 0
        for slot in slots:
            if self._shards[-1] and size + slot.bytes > SHARD_BYTES:
                self._shards.append([])
                size = 0
            self._shards[-1].append(slot)
            size += slot.bytes
        count = len(self._shards)
        self._names = [f"packed-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._done = _done(path / _JOURNAL, job)
        for file in path.glob("packed-*"):
            if not self._done or file.name not in self._names:
                file.unlink()
        fresh = path / (_JOURNAL + ".new")
        with fresh.open("w", encoding="utf-8") as journal:
            journal.writelines(json.dumps(line) + "\n" for line in (job, *self._done.items()))
        fresh.replace(path / _JOURNAL)
        self._journal = (path / _JOURNAL).open("a", encoding="utf-8")
        self._file: BinaryIO | None = None
        self.sums: dict[str, int] = {}

    def close(self) -> None:
        """Close the files that are open."""
        self._journal.close()
        if self._file is not None:
            self._file.close()

    def open_each(self) -> Iterator[tuple[str, _core.TensorSlot, bool]]:
        """(file name, tensor, whether it is there) in order.

        `write` takes the bytes of one that is not before the next. `sums` has its checksum then.
        """
        for name, slots in zip(self._names, self._shards, strict=True):
            (self.path / name).touch()
            with (self.path / name).open("r+b") as file:
                self._file = file
                header = _header(slots)
                file.write(header)
                at = len(header)
                for slot in slots:
                    kept = self._kept(file, slot, at)
                    file.seek(at)
                    yield name, slot, kept
                    if not kept:
                        file.flush()
                        self._journal.write(json.dumps([slot.fqn, self.sums[slot.fqn]]) + "\n")
                        self._journal.flush()
                    at += slot.bytes
                file.truncate(at)
                sync(file)

    def write(self, slot: _core.TensorSlot, data: memoryview) -> None:
        """Bytes of the tensor that `open_each` gave last."""
        assert self._file is not None
        self.sums[slot.fqn] = _core.crc32(data)
        self._file.write(data)

    def _kept(self, file: BinaryIO, slot: _core.TensorSlot, at: int) -> bool:
        """Whether an earlier run wrote a tensor, and its bytes are those that it wrote."""
        if slot.fqn not in self._done:
            return False
        file.seek(at)
        crc, left = 0, slot.bytes
        while left > 0 and (data := file.read(min(PIECE_BYTES, left))):
            crc = _core.crc32(data, crc)
            left -= len(data)
        self.sums[slot.fqn] = crc
        return left == 0 and crc == self._done[slot.fqn]


def _done(journal: Path, job: Mapping[str, Any]) -> dict[str, int]:
    """Checksums of the tensors that an earlier run of the same job wrote, by FQN."""
    done: dict[str, int] = {}
    with contextlib.suppress(ValueError, FileNotFoundError):  # a killed run leaves half a line
        lines = iter(journal.read_text(encoding="utf-8").splitlines())
        if json.loads(next(lines, "0")) == job:
            for line in lines:
                fqn, crc = json.loads(line)
                done[fqn] = crc
    return done


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


def partial_of(out: Path) -> Path:
    """Where a bundle is written before it appears at `out`."""
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def appearing(out: Path, *, replace: bool) -> Iterator[Path]:
    """A directory to fill that becomes `out` at the end.

    After an error it is removed; after an interruption it stays, for the next run to go on.

    Args:
        out: What must not be there yet.
        replace: A bundle at `out` may be there, and is replaced.

    Raises:
        InvalidArgument: `out` is there, another process writes it, or the disk is full.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - Path.resolve would follow a link
    check_free(out, replace=replace)
    partial = partial_of(out)
    try:
        with _locked(partial, out):
            try:
                yield partial
                _rename(partial, out, replace=replace)
            except Exception:
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
    """A directory that this process alone fills; an earlier run may have left some of it."""
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
        if left and not (partial / _JOURNAL).is_file():
            raise InvalidArgument(f"{partial}: it is there already, and not from a run before")
        (partial / _JOURNAL).touch()
        for file in left:
            if file.name != _JOURNAL and not file.name.startswith("packed-"):
                file.unlink()
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
    (out / _JOURNAL).unlink()
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(out.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
