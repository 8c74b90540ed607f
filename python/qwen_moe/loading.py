"""Weights of a checkpoint -> the core, one piece at a time.

A piece is at most `PIECE_BYTES` of one tensor, read through a mapping of its shard that is dropped
again after `WINDOW_BYTES`: pages of a mapped file count as memory of the process until then.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm  # type: ignore[import-untyped]

from qwen_moe import _core
from qwen_moe.checkpoint import DTYPE_BYTES, Checkpoint, Source, StoredTensor
from qwen_moe.errors import FormatError

PIECE_BYTES = 8 << 20
WINDOW_BYTES = 16 << 20
ROW_STEP = 64  # matrices are cut at multiples of this many rows


def load(
    checkpoint: Checkpoint,
    *,
    recipe: str,
    devices: Sequence[str],
    split: Sequence[int],
    threads: int,
    progress: bool | None = None,
) -> _core.Model:
    """Read, pack and place the weights; tensors that the process already holds are not read again.

    Args:
        checkpoint: The opened checkpoint.
        recipe: none, int8, int4 or int4-all.
        devices: Where contiguous spans of layers go, in order.
        split: The first layer of every device but the first.
        threads: CPU threads that pack.
        progress: Show a progress bar on stderr; None shows it on a terminal.

    Raises:
        FormatError: A tensor is missing or broken; nothing was allocated yet when its header is.
    """
    slots = _core.plan(checkpoint.config, recipe, checkpoint.dtype)
    sources = {} if checkpoint.dummy else checkpoint.sources(slots)
    model = _core.Model(
        config=checkpoint.config,
        recipe=recipe,
        dtype=checkpoint.dtype,
        checkpoint=checkpoint.identity,
        devices=devices,
        split=split,
        threads=threads,
    )
    needed: dict[str, _core.TensorSlot] = {}
    for slot in model.slots:
        if not slot.resident:
            needed[slot.fqn] = slot
    with _bar(_total(needed, sources), recipe, progress) as bar, _Shards() as shards:
        for fqn, slot in needed.items():
            if checkpoint.dummy:
                model.fill_random(fqn, _seed(fqn))
                bar.update(slot.bytes)
                continue
            source = sources[fqn]
            for piece in _pieces(shards, slot, source):
                first, data = piece
                try:
                    model.put(fqn, data.view(torch.uint8).numpy().data, _dtype_name(data), first)
                except FormatError as error:
                    raise FormatError(f"{source.parts[0][0].file}: {error}") from error
                bar.update(data.nbytes)
                del piece, data  # the shard stays mapped while a tensor refers to it
    model.finish()
    return model


class _Shards:
    """Open shard files, re-opened whenever a window's worth of them was read."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}
        self._read = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def read(self, tensor: StoredTensor, begin: int, end: int) -> torch.Tensor:
        """Entries [begin, end) of the leading dimension: a view of the file."""
        if self._read >= WINDOW_BYTES:
            self._close()
        try:
            if tensor.file not in self._open:
                opened: Any = safe_open(tensor.file, framework="pt")
                self._open[tensor.file] = opened.__enter__()
            part: torch.Tensor = self._open[tensor.file].get_slice(tensor.name)[begin:end]
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{tensor.describe()}: {error}") from error
        self._read += part.nbytes
        return part

    def _close(self) -> None:
        for opened in self._open.values():
            opened.__exit__(None, None, None)
        self._open.clear()
        self._read = 0


def _pieces(
    shards: _Shards, slot: _core.TensorSlot, source: Source
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first entry, contiguous tensor of whole entries), in order."""
    entries = slot.shape[0]
    tensors = source.parts[0]
    entry_bytes = sum(_bytes(tensor) for tensor in tensors)
    if not source.per_expert:
        entry_bytes = max(1, entry_bytes // entries)
    step = max(1, PIECE_BYTES // entry_bytes)
    if len(slot.shape) == 2 and step < entries:
        step = max(ROW_STEP, step // ROW_STEP * ROW_STEP)
    for begin in range(0, entries, step):
        end = min(begin + step, entries)
        if not source.per_expert:
            yield begin, shards.read(tensors[0], begin, end)
            continue
        rows = [tensor for row in source.parts[begin:end] for tensor in row]
        yield begin, torch.cat([shards.read(tensor, 0, tensor.shape[0]) for tensor in rows])


def _bytes(tensor: StoredTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count * DTYPE_BYTES[tensor.dtype]


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _seed(fqn: str) -> int:
    return int.from_bytes(hashlib.sha256(fqn.encode()).digest()[:8], "little")


def _total(needed: dict[str, _core.TensorSlot], sources: dict[str, Source]) -> int:
    if not sources:
        return sum(slot.bytes for slot in needed.values())
    return sum(_bytes(tensor) for fqn in needed for tensor in sources[fqn].tensors())


def _bar(total: int, recipe: str, progress: bool | None) -> Any:  # noqa: ANN401 - tqdm is untyped
    show = sys.stderr.isatty() if progress is None else progress
    options = {} if show else {"disable": True}  # else TQDM_DISABLE decides
    label = "loading" if recipe == "none" else f"loading as {recipe}"
    return tqdm(total=total, desc=label, unit="B", unit_scale=True, leave=False, **options)
