"""A bundle: a directory that holds a model packed already. Opening one copies bytes.

Beside config.json and the tokenizer lie safetensors files with one uint8 tensor for each tensor of
the core, in the layout of csrc/model/quant.h, and a manifest. The manifest is written last. It has
`format`, `version`, `recipe`, `dtype` (of the source's large matrices), `group` (the most input
features that share a scale), `source` and `config` (the source's fingerprint, its config's hash),
`tensors` (by name: file, shape, format, group, bytes, crc32) and `state`, the mutable buffers of a
session (name, dtype, shape, kind).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwen_moe import _core
from qwen_moe.config import load_json
from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.shards import OpenFiles, StoredTensor, read_header

MANIFEST = "qwen_moe_bundle.json"
FORMAT = "qwen_moe.bundle"
VERSION = 1
PIECE_BYTES = 16 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedFile:
    """Where one packed tensor lies, and what it is.

    Attributes:
        fqn: Name in the core.
        file: The safetensors file.
        offset: Of its first byte in the file.
        shape: In the checkpoint that was packed.
        format: f32, f16, bf16, int8 or int4.
        group: Input features per scale; 0 when dense.
        bytes: Packed size.
        crc32: Checksum of these bytes.
    """

    fqn: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    format: str
    group: int
    bytes: int
    crc32: int

    def describe(self) -> str:
        """Name, shape, format and file, for errors."""
        groups = f" group {self.group}" if self.group else ""
        return f"{self.fqn} {list(self.shape)} {self.format}{groups} in {self.file}"


class Bundle:
    """The manifest of a bundle, checked against the headers of its files.

    Attributes:
        path: The directory.
        recipe: int8, int4 or int4-all.
        dtype: Of the source's large matrices: bfloat16, float16 or float32.
        group: The most input features that share a scale.
        source: Fingerprint of the checkpoint that was packed.
        tensors: By FQN.
        files: The manifest and the safetensors files.
    """

    def __init__(self, path: Path, config: _core.ModelConfig) -> None:
        """Read the manifest and the headers.

        Args:
            path: The directory.
            config: What its config.json says.

        Raises:
            FormatError: A newer version, another config, or a file that is missing or broken.
        """
        self.path = path
        manifest = path / MANIFEST
        raw = load_json(manifest)
        if _field(raw, "format", str, manifest) != FORMAT:
            raise FormatError(f"{manifest}: its format is {raw['format']!r}, not {FORMAT!r}")
        version = _field(raw, "version", int, manifest)
        if version != VERSION:
            hint = "; update the engine" if version > VERSION else ""
            raise FormatError(
                f"{manifest}: the bundle is of version {version}; this engine reads version "
                f"{VERSION}{hint}"
            )
        self.recipe = _field(raw, "recipe", str, manifest)
        self.dtype = _field(raw, "dtype", str, manifest)
        self.group = _field(raw, "group", int, manifest)
        self.source = _field(raw, "source", str, manifest)
        if _field(raw, "config", str, manifest) != config.hash:
            raise FormatError(
                f"{path / 'config.json'}: its hash is {config.hash}; {MANIFEST} was written for "
                f"{raw['config']}"
            )
        if _field(raw, "state", list, manifest) != declared_state(config):
            raise FormatError(
                f"{manifest}: it declares other mutable buffers than this engine keeps for its "
                "config; write the bundle again"
            )
        self.tensors = dict(_tensors(path, _field(raw, "tensors", dict, manifest)))
        self.files = [manifest, *sorted({tensor.file for tensor in self.tensors.values()})]

    def check_recipe(self, recipe: str) -> None:
        """A bundle has one recipe.

        Raises:
            InvalidArgument: `recipe` is another.
        """
        if recipe != self.recipe:
            raise InvalidArgument(
                f"{self.path}: the bundle was packed as {self.recipe} and cannot be opened as "
                f"{recipe}; leave quantize out, or open the checkpoint that it was made from"
            )

    def check_group(self, least: int) -> None:
        """No group of input features with one scale is smaller than a device takes.

        Raises:
            InvalidArgument: One is.
        """
        for tensor in self.tensors.values():
            if 0 < tensor.group < least:
                raise InvalidArgument(
                    f"{tensor.describe()}: a GPU takes groups of at least {least}; open the bundle "
                    'with device="cpu", or write it again with a larger --group'
                )

    def stored(self) -> dict[str, str]:
        """Formats of the quantized matrices, by FQN."""
        return {
            fqn: tensor.format
            for fqn, tensor in self.tensors.items()
            if tensor.format in ("int8", "int4")
        }

    def check(self, slots: Sequence[_core.TensorSlot]) -> None:
        """The tensors are those that the core asks for, each in the same layout.

        Raises:
            FormatError: One is missing, or of another shape, format, group or size.
        """
        missing = sorted({slot.fqn for slot in slots} - set(self.tensors))
        if missing:
            raise FormatError(
                f"{self.path / MANIFEST}: {len(missing)} of the model's tensors are missing: "
                f"{', '.join(missing[:5])}"
            )
        for slot in slots:
            tensor = self.tensors[slot.fqn]
            asked = (tuple(slot.shape), slot.format, slot.group, slot.bytes)
            if (tensor.shape, tensor.format, tensor.group, tensor.bytes) != asked:
                where = f" on {slot.device}" if slot.device else ""
                raise FormatError(
                    f"{tensor.describe()}: {tensor.bytes} packed bytes; the engine{where} needs "
                    f"shape {asked[0]} as {slot.format}, group {slot.group}, {slot.bytes} bytes"
                )

    def put(
        self, model: _core.Model, slots: Iterable[_core.TensorSlot], threads: int
    ) -> Iterator[int]:
        """Copy tensors into the model; yields the bytes of each piece that is done.

        Pieces are read and checked by all threads at once, those of one tensor too.

        Raises:
            FormatError: A file cannot be read, or a checksum differs.
        """
        with contextlib.ExitStack() as stack:
            files = stack.enter_context(OpenFiles())
            pieces: list[_Piece] = []
            for slot in slots:
                tensor = self.tensors[slot.fqn]
                try:
                    file = files.descriptor(tensor.file)
                except FormatError as error:
                    raise FormatError(f"{tensor.describe()}: {error}") from error
                step = max(1, PIECE_BYTES // slot.unit_bytes) * slot.unit_bytes
                for at in range(0, tensor.bytes, step):
                    pieces.append(_Piece(tensor, file, at, min(step, tensor.bytes - at)))
            readers = stack.enter_context(ThreadPoolExecutor(threads))
            stack.callback(readers.shutdown, wait=True, cancel_futures=True)
            tasks = {readers.submit(_read, model, piece): piece for piece in pieces}
            sums: dict[str, dict[int, tuple[int, int]]] = {}
            for task in as_completed(tasks):
                piece = tasks.pop(task)
                tensor = piece.tensor
                of_tensor = sums.setdefault(tensor.fqn, {})
                of_tensor[piece.at] = (task.result(), piece.bytes)
                if sum(size for _, size in of_tensor.values()) == tensor.bytes:
                    _check_sum(tensor, [of_tensor[at] for at in sorted(of_tensor)])
                    model.accept(tensor.fqn)
                    del sums[tensor.fqn]
                yield piece.bytes


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Bytes [at, at + bytes) of a tensor, whole units, and the open file that they are in."""

    tensor: PackedFile
    file: int
    at: int
    bytes: int


def _read(model: _core.Model, piece: _Piece) -> int:
    """Read one piece into its place; gives its checksum."""
    tensor = piece.tensor
    try:
        return model.read_packed(
            tensor.fqn, piece.file, tensor.offset + piece.at, piece.bytes, piece.at
        )
    except FormatError as error:
        raise FormatError(f"{tensor.describe()}: {error}") from error


def _check_sum(tensor: PackedFile, pieces: Iterable[tuple[int, int]]) -> None:
    """The checksums of all pieces, with their sizes, make up that of the tensor."""
    crc = 0
    for each, size in pieces:
        crc = _core.crc32_combine(crc, each, size)
    if crc != tensor.crc32:
        raise FormatError(
            f"{tensor.describe()}: it is damaged: its checksum is {crc:08x}, "
            f"{MANIFEST} says {tensor.crc32:08x}"
        )


def declared_state(config: _core.ModelConfig) -> list[dict[str, Any]]:
    """The mutable buffers of a session, as the manifest lists them (with bfloat16 KV)."""
    return [
        {"name": name, "dtype": dtype, "shape": shape, "kind": kind}
        for name, dtype, shape, kind in _core.state_buffers(config, "bfloat16")
    ]


def _tensors(path: Path, listed: dict[str, Any]) -> Iterator[tuple[str, PackedFile]]:
    manifest = path / MANIFEST
    headers: dict[str, dict[str, StoredTensor]] = {}
    for fqn, entry in listed.items():
        name = _field(entry, "file", str, manifest)
        if Path(name).name != name:
            raise FormatError(f"{manifest}: {fqn} is placed in {name!r}, which is no file name")
        if name not in headers:
            headers[name] = read_header(path / name)
        size = _field(entry, "bytes", int, manifest)
        stored = headers[name].get(fqn)
        if stored is None or stored.size != size:
            found = "no such tensor" if stored is None else f"{stored.size} bytes of it"
            raise FormatError(
                f"{path / name}: holds {found}; {MANIFEST} places {size} bytes of {fqn} there"
            )
        try:
            crc = int(_field(entry, "crc32", str, manifest), 16)
            shape = tuple(int(length) for length in _field(entry, "shape", list, manifest))
        except (TypeError, ValueError) as error:
            raise FormatError(f"{manifest}: {fqn}: {error}") from error
        yield (
            fqn,
            PackedFile(
                fqn,
                path / name,
                stored.offset,
                shape,
                _field(entry, "format", str, manifest),
                _field(entry, "group", int, manifest),
                size,
                crc,
            ),
        )


def _field(raw: Any, name: str, kind: type[T], source: Path) -> T:  # noqa: ANN401 - of a JSON file
    value = raw.get(name) if isinstance(raw, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"{source}: {name} must be {kind.__name__}, got {value!r}")
    return value
