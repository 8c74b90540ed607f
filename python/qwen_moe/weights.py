"""A weight of the model in whatever form a checkpoint holds it.

Every format of `qwen_moe.formats` gives one `Weight` for each tensor that the core asks for. It is
read a few entries at a time: as values, or where the engine's own formats hold the same codes and
scales, as those.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from qwen_moe.errors import FormatError

if TYPE_CHECKING:
    from qwen_moe.shards import Shards, StoredTensor

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CODED_BYTES = 4
GROUPS = (128, 64, 32)  # input features per scale that the core's kernels take


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes and scales that the core can keep: int4 or int8, and the input features per scale."""

    format: str
    group: int


class Extent(NamedTuple):
    """A run of bytes in a file."""

    file: Path
    offset: int
    size: int


class Weight(ABC):
    """One weight, readable in parts.

    Attributes:
        name: In the checkpoint, for errors.
        shape: Of the weight, whatever the shape of the tensors that hold it.
        dtype: Of what `read` gives.
        file: The first that holds it.
    """

    __slots__ = ()
    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    @property
    def codes(self) -> Codes | None:
        """What `read_coded` gives; None when only values can be had."""
        return None

    @property
    def plain(self) -> bool:
        """The files hold the bytes that `read` gives, so that the core can read them itself."""
        return False

    def extents(self, begin: int, end: int) -> list[Extent]:
        """Where entries [begin, end) of a plain weight lie, one run after the other."""
        raise NotImplementedError(self.describe())

    @abstractmethod
    def describe(self) -> str:
        """Name, shape, format and file, for errors."""

    @abstractmethod
    def tensors(self) -> Iterable[StoredTensor]:
        """Every tensor that it is made of."""

    @abstractmethod
    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of entries [begin, end) of the leading dimension, contiguous.

        Raises:
            FormatError: A file cannot be read, or a tensor in it is broken.
        """

    def read_coded(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """As `read`, for the core's dtype "coded": int32, the code below the bits of an f16 scale.

        Raises:
            FormatError: A file cannot be read, or a scale does not fit.
        """
        raise NotImplementedError(self.describe())


class Composite(Weight):
    """A weight that is named after the first of its tensors."""

    __slots__ = ()

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of that tensor."""
        return next(iter(self.tensors())).name

    @property
    def file(self) -> Path:  # type: ignore[override]
        """Of that tensor."""
        return next(iter(self.tensors())).file


@dataclass(frozen=True, slots=True)
class Levels:
    """Quantized values of some rows: scale * (code - zero).

    Attributes:
        codes: [rows, input features], any integer type.
        scales: [rows, groups], floating point.
        zeros: [rows, groups], any integer type; None when 0 was taken away already.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None


class QuantizedMatrix(Composite):
    """A matrix of integer codes with a scale for every group of input features.

    Attributes:
        format: int4 or int8.
        group: Input features per scale.
        symmetric: Code 0 stands for the value 0 in every group.
    """

    __slots__ = ()
    format: str
    group: int
    symmetric: bool
    dtype = "float32"

    @abstractmethod
    def levels(self, shards: Shards, begin: int, end: int) -> Levels:
        """Of output features [begin, end)."""

    @property
    def codes(self) -> Codes | None:
        """Symmetric codes can be kept where the group is a multiple of one that the core has."""
        fits = [group for group in GROUPS if self.group % group == 0]
        return Codes(self.format, fits[0]) if self.symmetric and fits else None

    def describe(self) -> str:
        """Name, shape, format and file, for errors."""
        return f"{self.name} {list(self.shape)} {self.format} group {self.group} in {self.file}"

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of output features [begin, end): float32 [rows, input features]."""
        levels = self._finite_levels(shards, begin, end)
        rows = levels.codes.shape[0]
        values = levels.codes.float().view(rows, -1, self.group)
        if levels.zeros is not None:
            values = values - levels.zeros.float().unsqueeze(-1)
        return (values * levels.scales.float().unsqueeze(-1)).view(rows, -1)

    def read_coded(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Codes and scales of output features [begin, end): int32 [rows, input features]."""
        levels = self._finite_levels(shards, begin, end)
        scales = levels.scales.half()
        if not scales.isfinite().all():
            raise FormatError(
                f"{self.describe()}: a scale of {float(levels.scales.abs().max()):g} does not fit "
                "float16, in which scales are kept"
            )
        bits = scales.view(torch.int16).int() << 16
        rows = levels.codes.shape[0]
        codes = levels.codes.int().view(rows, -1, self.group) & 0xFFFF
        return (codes | bits.unsqueeze(-1)).view(rows, -1)

    def _finite_levels(self, shards: Shards, begin: int, end: int) -> Levels:
        levels = self.levels(shards, begin, end)
        bad = (~levels.scales.isfinite()).nonzero()
        if len(bad):
            row, group = bad[0].tolist()
            expert, output = (
                divmod(row, self.shape[-2]) if len(self.shape) > 2 else (0, begin + row)
            )
            where = f"expert {begin + expert}, " if len(self.shape) > 2 else ""
            raise FormatError(
                f"{self.describe()}: the scale of {where}output feature {output}, input features "
                f"from {group * self.group}, is {float(levels.scales[row, group])}; it must be "
                "finite"
            )
        return levels


@dataclass(frozen=True, slots=True)
class StackedExperts(Weight):
    """Experts that the checkpoint holds one by one, as the one weight that the core asks for.

    Attributes:
        parts: For each expert the matrices that lie one after the other: (down,) or (gate, up).
    """

    name: str
    parts: tuple[tuple[Weight, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """[experts, output features of all parts, input features]."""
        first = self.parts[0]
        return (len(self.parts), sum(part.shape[0] for part in first), first[0].shape[1])

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """That of the parts, or float32 when they differ."""
        dtypes = {part.dtype for part in self.leaves()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    @property
    def file(self) -> Path:  # type: ignore[override]
        """Of the first expert."""
        return self.parts[0][0].file

    @property
    def codes(self) -> Codes | None:
        """Those of the parts when all of them have some in one format."""
        return common_codes(list(self.leaves()))

    @property
    def plain(self) -> bool:
        """Every part is, in one dtype."""
        leaves = list(self.leaves())
        return all(leaf.plain and leaf.dtype == leaves[0].dtype for leaf in leaves)

    def extents(self, begin: int, end: int) -> list[Extent]:
        """Those of the parts of experts [begin, end)."""
        parts = self._parts_of(begin, end)
        return [extent for part in parts for extent in part.extents(0, part.shape[0])]

    def leaves(self) -> Iterable[Weight]:
        """Every part of every expert, in order."""
        return (part for row in self.parts for part in row)

    def describe(self) -> str:
        """Name, shape and first file, for errors."""
        return f"{self.name} {list(self.shape)} from {self.file}"

    def tensors(self) -> Iterable[StoredTensor]:
        """Those of every part."""
        return (tensor for part in self.leaves() for tensor in part.tensors())

    def read(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Values of experts [begin, end): their rows one after the other."""
        rows = [part.read(shards, 0, part.shape[0]) for part in self._parts_of(begin, end)]
        if self.dtype == "float32":
            rows = [row.float() for row in rows]
        return torch.cat(rows)

    def read_coded(self, shards: Shards, begin: int, end: int) -> torch.Tensor:
        """Codes and scales of experts [begin, end): their rows one after the other."""
        return torch.cat(
            [part.read_coded(shards, 0, part.shape[0]) for part in self._parts_of(begin, end)]
        )

    def _parts_of(self, begin: int, end: int) -> list[Weight]:
        return [part for row in self.parts[begin:end] for part in row]


def common_codes(weights: Sequence[Weight]) -> Codes | None:
    """The codes that weights have in common: one format, and the smallest group, which divides."""
    found = [weight.codes for weight in weights]
    known = [codes for codes in found if codes is not None]
    if len(known) < len(found) or len({codes.format for codes in known}) != 1:
        return None
    return Codes(known[0].format, min(codes.group for codes in known))


def entry_bytes(weight: Weight, *, coded: bool) -> int:
    """Bytes that one entry of the leading dimension has once it is read."""
    each = CODED_BYTES if coded else DTYPE_BYTES[weight.dtype]
    return math.prod(weight.shape[1:]) * each
