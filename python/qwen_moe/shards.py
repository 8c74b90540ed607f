"""The safetensors files of a checkpoint: what their headers say, and reading a part of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_moe.closing import Closing
from qwen_moe.errors import FormatError
from qwen_moe.weights import Weight

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


@dataclass(frozen=True, slots=True)
class StoredTensor(Weight):
    """One tensor of a shard file, and the weight that it is in an unquantized checkpoint.

    `dtype` is bfloat16, float16 or float32, or what safetensors calls any other.
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def describe(self) -> str:
        """Name, shape, dtype and file, for errors."""
        return f"{self.name} {list(self.shape)} {self.dtype} in {self.file}"

    def tensors(self) -> tuple[StoredTensor, ...]:
        """Itself."""
        return (self,)

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Entries [begin, end) of the leading dimension: a view of the file."""
        return shards.read(self, slice(begin, end))


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor of a safetensors file.

    Raises:
        FormatError: The file is missing, truncated or corrupt.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            header = {}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                header[name] = (tuple(part.get_shape()), DTYPES.get(dtype, dtype))
            return header
    except FileNotFoundError:
        raise FormatError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: {error}") from error
