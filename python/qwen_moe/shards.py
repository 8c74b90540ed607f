"""The safetensors files of a checkpoint: what their headers say, and reading a part of a tensor."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_moe.closing import Closing
from qwen_moe.errors import FormatError
from qwen_moe.weights import Extent, Weight

WINDOW_BYTES = 16 << 20

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Shards(Closing):
    """Open shard files, re-opened whenever a window's worth of them was read.

    Pages of a mapped file count as memory of the process for as long as it is mapped.
    """

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._open: dict[Path, Any] = {}
        self._read = 0

    def read(self, tensor: StoredTensor, *part: slice) -> torch.Tensor:
        """A part of a tensor, one slice for each of its leading dimensions: a view of the file.

        Raises:
            FormatError: The file cannot be read.
        """
        if self._read >= WINDOW_BYTES:
            self.close()
        try:
            if tensor.file not in self._open:
                opened: Any = safe_open(tensor.file, framework="pt")
                self._open[tensor.file] = opened.__enter__()
            got: torch.Tensor = self._open[tensor.file].get_slice(tensor.name)[part]
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{tensor.describe()}: {error}") from error
        self._read += got.nbytes
        return got

    def close(self) -> None:
        """Close every file."""
        for opened in self._open.values():
            opened.__exit__(None, None, None)
        self._open.clear()
        self._read = 0


class OpenFiles(Closing):
    """Files that any thread may read, by descriptor."""

    def __init__(self) -> None:
        """Nothing is open yet."""
        self._lock = threading.Lock()
        self._open: dict[Path, int] = {}

    def descriptor(self, file: Path) -> int:
        """Of a file, which stays open until `close`.

        Raises:
            FormatError: It cannot be opened.
        """
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY)
                except OSError as error:
                    raise FormatError(f"{file}: {error}") from error
            return self._open[file]

    def parts(self, extents: list[Extent]) -> list[tuple[int, int, int]]:
        """Descriptor, offset and size of each, as the core reads them."""
        return [(self.descriptor(file), offset, size) for file, offset, size in extents]

    def close(self) -> None:
        """Close every file."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


@dataclass(frozen=True, slots=True)
class StoredTensor(Weight):
    """One tensor of a shard file, and the weight that it is in an unquantized checkpoint.

    `dtype` is bfloat16, float16 or float32, or what the file calls any other. Its `size` bytes
    begin at byte `offset` of the file.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int

    @property
    def plain(self) -> bool:
        """Always."""
        return True

    def extents(self, begin: int, end: int) -> list[Extent]:
        """One run."""
        each = self.size // self.shape[0]
        return [Extent(self.file, self.offset + begin * each, (end - begin) * each)]

    def describe(self) -> str:
        """Name, shape, dtype and file, for errors."""
        return f"{self.name} {list(self.shape)} {self.dtype} in {self.file}"

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Itself."""
        return (self,)

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Entries [begin, end) of the leading dimension: a view of the file."""
        return shards.read(self, slice(begin, end))


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by name.

    Raises:
        FormatError: The file is missing, truncated or corrupt.
    """
    try:
        with safe_open(file, framework="pt"):  # which checks the header against the file's size
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: {error}") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"], entry["dtype"])
        found[name] = StoredTensor(
            name, file, tuple(entry["shape"]), dtype, 8 + length + begin, end - begin
        )
    return found
