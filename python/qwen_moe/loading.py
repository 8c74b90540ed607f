"""Weights of a checkpoint -> the core, one piece at a time.

Values that lie in the files as they are the core reads itself, at most `READ_BYTES` at a time.
Others are computed here, `PIECE_BYTES` at a time. Codes and scales that a checkpoint has already go
to the core as they are where one of its formats holds them.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from qwen_moe import _core
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.errors import FormatError
from qwen_moe.plan import plan, report
from qwen_moe.shards import OpenFiles, Shards
from qwen_moe.weights import Weight, entry_bytes

PIECE_BYTES = 8 << 20
READ_BYTES = 16 << 20
ROW_STEP = 64  # matrices are cut at multiples of this many rows

_turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)


def load(
    checkpoint: Checkpoint,
    *,
    recipe: str,
    devices: Sequence[str],
    split: Sequence[int],
    threads: int,
    group: int | None = None,
    progress: bool | None = None,
) -> _core.Model:
    """Read, pack and place the weights; tensors that the process already holds are not read again.

    Args:
        checkpoint: The opened checkpoint.
        recipe: none, int8, int4 or int4-all.
        devices: Where contiguous spans of layers go, in order.
        split: The first layer of every device but the first.
        threads: CPU threads that pack.
        group: Input features that share a scale; see `plan`.
        progress: Show a progress bar on stderr; None shows it on a terminal.

    Raises:
        FormatError: A tensor is missing or broken; nothing was allocated yet when its header is.
    """
    # Engines that open one checkpoint at once would fill the same tensors.
    with _turns[checkpoint.identity]:
        return _load(checkpoint, recipe, devices, split, threads, group, progress)


def _load(
    checkpoint: Checkpoint,
    recipe: str,
    devices: Sequence[str],
    split: Sequence[int],
    threads: int,
    group: int | None,
    progress: bool | None,
) -> _core.Model:
    found = plan(checkpoint, recipe, devices, group)
    sources, stored = found.sources, found.stored
    if checkpoint.bundle is None:
        report(checkpoint, found)
    model = _core.Model(
        config=checkpoint.config,
        recipe=recipe,
        dtype=checkpoint.dtype,
        checkpoint=f"{checkpoint.identity} {found.group}",
        devices=devices,
        split=split,
        threads=threads,
        stored=stored,
        group=found.group,
    )
    needed: dict[str, _core.TensorSlot] = {}
    for slot in model.slots:
        if not slot.resident:
            needed[slot.fqn] = slot
    total = sum(_bytes(sources, stored, slot) for slot in needed.values())
    label = "loading" if recipe == "none" else f"loading as {recipe}"
    with progress_bar(total, label, progress) as bar:
        if checkpoint.bundle is not None:
            checkpoint.bundle.check(model.slots)  # a GPU may ask for another layout than the plan
            steps = checkpoint.bundle.put(model, needed.values(), threads)
        elif checkpoint.dummy:
            steps = _fill_random(model, needed)
        else:
            steps = _pack(model, needed, sources, stored, readers(devices, threads))
        for count in steps:
            bar.update(count)
    model.finish()
    return model


def _fill_random(model: _core.Model, needed: Mapping[str, _core.TensorSlot]) -> Iterator[int]:
    """Yields the bytes of every tensor that is done."""
    for fqn, slot in needed.items():
        model.fill_random(fqn, seed(fqn))
        yield slot.bytes


def _pack(
    model: _core.Model,
    needed: Mapping[str, _core.TensorSlot],
    sources: Mapping[str, Weight],
    stored: Mapping[str, str],
    workers: int,
) -> Iterator[int]:
    """Yields the bytes of every piece that is done."""
    todo = [
        piece
        for fqn, slot in needed.items()
        for piece in pieces(slot, sources[fqn], _Resident(model, fqn), coded=fqn in stored)
    ]
    return put_pieces(todo, workers)


class Sink(Protocol):
    """A tensor that is being filled; `_core.PackedTensor` is one."""

    def put(self, data: memoryview, dtype: str, first: int = ...) -> None:
        """As `_core.Model.put`."""

    def read(self, parts: Sequence[tuple[int, int, int]], dtype: str, first: int = ...) -> None:
        """As `_core.Model.read`."""


@dataclass(frozen=True, slots=True)
class _Resident:
    """That of a model."""

    model: _core.Model
    fqn: str

    def put(self, data: memoryview, dtype: str, first: int = 0) -> None:
        self.model.put(self.fqn, data, dtype, first)

    def read(self, parts: Sequence[tuple[int, int, int]], dtype: str, first: int = 0) -> None:
        self.model.read(self.fqn, parts, dtype, first)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Entries [begin, end) of a tensor's leading dimension.

    Attributes:
        weight: What has them.
        sink: Where they go.
        coded: As codes and scales.
        plain: Dtype of values that the core reads itself; None of others.
        bytes: That they have once they are read.
    """

    weight: Weight
    sink: Sink
    coded: bool
    plain: str | None
    begin: int
    end: int
    bytes: int


def pieces(slot: _core.TensorSlot, weight: Weight, sink: Sink, *, coded: bool) -> Iterator[Piece]:
    """What a tensor is read in, in order."""
    entries = slot.shape[0]
    plain = weight.dtype if weight.plain and not coded else None
    most = PIECE_BYTES if plain is None else READ_BYTES
    each = entry_bytes(weight, coded=coded)
    step = max(1, most // max(1, each))
    if len(slot.shape) == 2 and step < entries:
        step = max(ROW_STEP, step // ROW_STEP * ROW_STEP)
    for begin in range(0, entries, step):
        end = min(begin + step, entries)
        yield Piece(weight, sink, coded, plain, begin, end, (end - begin) * each)


def readers(devices: Sequence[str], threads: int) -> int:
    """How many threads read pieces: on a CPU packing one takes all threads itself."""
    return min(threads, 8) if set(devices) == {"cpu"} else threads


def put_pieces(todo: Iterable[Piece], workers: int) -> Iterator[int]:
    """Read pieces to where they go, several at a time; yields the bytes of each that is done.

    Raises:
        FormatError: A file cannot be read, or a tensor in it is broken.
    """
    local = threading.local()
    mapped: list[Shards] = []
    files = OpenFiles()

    def work(piece: Piece) -> int:
        weight = piece.weight
        if piece.plain is not None:
            parts = files.parts(weight.extents(piece.begin, piece.end))
            with _named(weight):
                piece.sink.read(parts, piece.plain, piece.begin)
            return piece.bytes
        if not hasattr(local, "shards"):  # a mapped file belongs to one thread
            local.shards = Shards()
            mapped.append(local.shards)
        read = weight.read_coded if piece.coded else weight.read
        data = read(local.shards, piece.begin, piece.end)
        with _named(weight):
            dtype = "coded" if piece.coded else dtype_name(data)
            piece.sink.put(data.view(torch.uint8).numpy().data, dtype, piece.begin)
        return piece.bytes

    with ThreadPoolExecutor(workers) as pool:
        try:
            for task in as_completed([pool.submit(work, piece) for piece in todo]):
                yield task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for shards in mapped:
                shards.close()
            files.close()


@contextlib.contextmanager
def _named(weight: Weight) -> Iterator[None]:
    """Errors of the core name the file too."""
    try:
        yield
    except FormatError as error:
        raise FormatError(f"{weight.file}: {error}") from error


def dtype_name(tensor: torch.Tensor) -> str:
    """The core's name of a dtype: bfloat16, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def seed(fqn: str) -> int:
    """Of a tensor's random weights."""
    return int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:8], "little")


def _bytes(sources: Mapping[str, Weight], stored: Mapping[str, str], slot: _core.TensorSlot) -> int:
    if not sources:
        return slot.bytes
    return slot.shape[0] * entry_bytes(sources[slot.fqn], coded=slot.fqn in stored)


def progress_bar(total: int, label: str, progress: bool | None) -> Any:  # noqa: ANN401 - untyped
    """Of `total` bytes on stderr; None shows it on a terminal."""
    show = sys.stderr.isatty() if progress is None else progress
    options = {} if show else {"disable": True}  # else TQDM_DISABLE decides
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, **options)
