"""GGUF files, by the `gguf` package: metadata, and tensors as weights.

Q8_0 and Q4_0 have a float16 scale for every 32 input features, which is what the engine's int8 and
int4 have in groups of 32: codes and scales are kept. Other block formats are dequantized by the
package. Data is read from the file as it is asked for; nothing stays mapped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.shards import Shards, StoredTensor
from qwen_moe.weights import Composite, Extent, Levels, QuantizedMatrix, Weight

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODED = {"Q8_0": "int8", "Q4_0": "int4"}
_BLOCKS = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_GROUP = 32  # input features that share a scale in Q8_0 and Q4_0
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def package() -> ModuleType:
    """The `gguf` package.

    Raises:
        InvalidArgument: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise InvalidArgument(
            "reading GGUF needs the gguf package; install it with: pip install 'qwen_moe[gguf]'"
        ) from error
    return gguf


@dataclass(frozen=True, slots=True)
class Place:
    """Where the data of a tensor lies.

    Attributes:
        stored: Name, file and shape; its dtype is the GGUF type where that is no plain one.
        kind: The GGUF type: F32, Q8_0, Q4_K, ...
    """

    stored: StoredTensor
    kind: str

    def bytes(self, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Entries [begin, end) of the leading dimension.

        Raises:
            FormatError: The file cannot be read, or ends before.
        """
        ((file, offset, count),) = self.stored.extents(begin, end)
        try:
            data = np.fromfile(file, np.uint8, count, offset=offset)
        except OSError as error:
            raise FormatError(f"{self.stored.describe()}: {error}") from error
        if len(data) != count:
            raise FormatError(f"{self.stored.describe()}: the file is truncated")
        return data


@dataclass(frozen=True, slots=True)
class GgufTensor(Composite):
    """A tensor that is read as values: a plain one, or blocks that the package dequantizes."""

    place: Place

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Outermost dimension first."""
        return self.place.stored.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """Its own when it is plain, else float32."""
        return self.place.stored.dtype if self.place.kind in _DENSE else "float32"

    def describe(self) -> str:
        """Name, shape, type and file, for errors."""
        return self.place.stored.describe()

    def tensors(self) -> tuple[StoredTensor, ...]:
        """The one in the file."""
        return (self.place.stored,)

    @property
    def plain(self) -> bool:
        """Where it is no blocks."""
        return self.place.kind in _DENSE

    def extents(self, begin: int, end: int) -> list[Extent]:
        """One run."""
        return self.place.stored.extents(begin, end)

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of entries [begin, end) of the leading dimension."""
        data = self.place.bytes(begin, end)
        shape = (end - begin, *self.shape[1:])
        if self.place.kind in _DENSE:
            return torch.from_numpy(data).view(_DENSE[self.place.kind]).view(shape)
        gguf = package()
        rows = data.reshape(math.prod(shape[:-1]), -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType[self.place.kind])
        return torch.from_numpy(np.ascontiguousarray(values)).view(shape)


@dataclass(frozen=True, slots=True)
class GgufCodes(QuantizedMatrix):
    """A matrix, or a stack of them, in Q8_0 or Q4_0."""

    place: Place
    group = _GROUP
    symmetric = True

    @property
    def format(self) -> str:  # type: ignore[override]
        """int8 or int4."""
        return _CODED[self.place.kind]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Outermost dimension first."""
        return self.place.stored.shape

    def tensors(self) -> tuple[StoredTensor, ...]:
        """The one in the file."""
        return (self.place.stored,)

    def levels(self, shards: Shards, begin: int, end: int) -> Levels:
        """Of entries [begin, end) of the leading dimension, rows one after the other."""
        data = torch.from_numpy(self.place.bytes(begin, end))
        rows = (end - begin) * math.prod(self.shape[1:-1])
        blocks = data.view(rows, self.shape[-1] // _GROUP, -1)
        scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
        codes = blocks[..., 2:]
        if self.place.kind == "Q8_0":
            signed = codes.contiguous().view(torch.int8)
        else:  # the low nibbles are the first half of a block
            signed = (torch.cat([codes & 15, codes >> 4], -1).view(torch.int8)) - 8
        return Levels(signed.reshape(rows, -1), scales)


def tensor(place: Place) -> Weight:
    """The weight of one tensor.

    Raises:
        FormatError: Its type is one that is not read.
    """
    if place.kind in _CODED and len(place.stored.shape) > 1:
        return GgufCodes(place)
    if place.kind in (*_DENSE, *_CODED, *_BLOCKS):
        return GgufTensor(place)
    raise FormatError(
        f"{place.stored.describe()}: of GGUF types only "
        f"{', '.join((*_DENSE, *_CODED, *_BLOCKS))} are read"
    )


def reshaped(place: Place, shape: tuple[int, ...]) -> Place:
    """The same bytes in another shape of as many elements."""
    return replace(place, stored=replace(place.stored, shape=shape))


def find(path: Path) -> Path | None:
    """The GGUF file, or the first of a split one, that a checkpoint path means; None for others.

    Raises:
        InvalidArgument: A directory without config.json holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(path.glob("*.gguf"))
    splits = [_SPLIT.fullmatch(file.name) for file in found]
    heads = [
        file
        for file, split in zip(found, splits, strict=True)
        if split is None or split[2] == "00001"
    ]
    if len(heads) > 1:
        raise InvalidArgument(
            f"{path}: holds {len(heads)} GGUF models: {', '.join(file.name for file in heads)}; "
            "name the file"
        )
    return heads[0] if heads else None


def read(file: Path) -> tuple[Mapping[str, Any], dict[str, Place], list[Path]]:
    """Metadata, tensors by name, and the files of a GGUF model.

    Raises:
        FormatError: A file is missing, truncated or corrupt.
    """
    split = _SPLIT.fullmatch(file.name)
    files = [file]
    if split is not None:
        count = int(split[3])
        files = [
            file.with_name(f"{split[1]}-{index + 1:05}-of-{split[3]}.gguf")
            for index in range(count)
        ]
    metadata: dict[str, Any] = {}
    places: dict[str, Place] = {}
    for part in files:
        fields, found = _read_file(part)
        metadata = {**fields, **metadata}
        places |= found
    return metadata, places, files


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    gguf = package()
    if not file.is_file():
        raise FormatError(f"{file}: no such file")
    try:
        reader = gguf.GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # The package indexes into whatever it finds.
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file}: no GGUF file, or a truncated one: {error}") from error
    places = {}
    for entry in reader.tensors:
        kind = entry.tensor_type.name
        dtype = str(_DENSE[kind]).removeprefix("torch.") if kind in _DENSE else kind
        shape = tuple(int(size) for size in reversed(entry.shape))
        begin, size = int(entry.data_offset), int(entry.n_bytes)
        places[entry.name] = Place(StoredTensor(entry.name, file, shape, dtype, begin, size), kind)
    return fields, places
