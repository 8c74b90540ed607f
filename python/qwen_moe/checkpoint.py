"""A local Hugging Face directory or GGUF file: its config, and where each weight of it lies.

Opening one reads headers only. `loading.load` reads the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_moe import _core
from qwen_moe.bundle import MANIFEST, Bundle
from qwen_moe.config import (
    ARCHITECTURES,
    load_json,
    parse_config,
    quantization_config,
    text_config,
)
from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.formats import METHODS, gguf, gguf_model, gguf_tokenizer, quant_method
from qwen_moe.shards import StoredTensor, read_header
from qwen_moe.tokenizer import Tokenizer
from qwen_moe.weights import DTYPE_BYTES, StackedExperts, Weight

logger = logging.getLogger("qwen_moe")

LOAD_FORMATS = ("auto", "safetensors", "dummy")

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_PREFIXES = ("model.language_model.", "model.")
_SKIPPED = ("visual.", "model.visual.", "mtp.", "model.mtp.")
_EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Checkpoint:
    """A checkpoint directory or GGUF file, opened.

    Attributes:
        path: The directory, or the file.
        folder: The directory.
        config: The model's dimensions.
        raw_config: config.json, or what it would be beside a GGUF file.
        dtype: Of the large matrices: bfloat16, float16 or float32.
        quantization: How the checkpoint is quantized: fp8, gptq, gguf, ...; None when it is not.
        bundle: What the directory holds packed already; None when it is a checkpoint.
        dummy: Weights are to be random; no file is read.
        tensors: Of the files, by name without the prefix; empty for a dummy and for a bundle.
        weights: That these tensors make up, by FQN; empty for a dummy and for a bundle.
    """

    def __init__(self, path: str | Path, load_format: str = "auto") -> None:
        """Read the config and, unless `load_format` is "dummy", the header of every shard.

        Args:
            path: A directory with config.json, a GGUF file, or a directory with one.
            load_format: "auto", "safetensors" or "dummy".

        Raises:
            InvalidArgument: Neither, or a model that this engine cannot run.
            FormatError: A file is missing, truncated or corrupt.
        """
        if load_format not in LOAD_FORMATS:
            raise InvalidArgument(
                f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}"
            )
        self.path = Path(path)
        self.dummy = load_format == "dummy"
        self.bundle: Bundle | None = None
        self.tensors: dict[str, StoredTensor] = {}
        self.weights: dict[str, Weight] = {}
        self._shards: list[Path] = []
        self._gguf = gguf.find(self.path) if load_format != "safetensors" else None
        self._metadata: Mapping[str, Any] = {}
        self.folder = self.path.parent if self.path == self._gguf else self.path
        if self._gguf is not None:
            self._open_gguf(self._gguf)
        elif self.path.is_dir():
            self._open_directory()
        else:
            raise InvalidArgument(
                f"{self.path} is not a directory; a checkpoint is a directory with config.json, "
                "or a GGUF file"
            )

    def _open_directory(self) -> None:
        file = self.path / "config.json"
        self.raw_config = raw = load_json(file)
        self.config = parse_config(raw, str(file))
        settings = quantization_config(raw)
        self.quantization = quant_method(settings, str(file))
        self.dtype = _config_dtype(raw, file)
        if not self.dummy and (self.path / MANIFEST).is_file():
            self.bundle = Bundle(self.path, self.config)
            self.dtype = self.bundle.dtype
            self._shards = self.bundle.files
        elif not self.dummy:
            self._read_headers()
            self.weights.update(self.tensors)
            if self.quantization is not None:
                named = {fqn: t for fqn, t in self.tensors.items() if not fqn.startswith(_SKIPPED)}
                self.weights = METHODS[self.quantization](named, settings, str(file))
            embedding = self.tensors.get("embed_tokens.weight")
            if embedding is not None and embedding.dtype in DTYPE_BYTES:
                self.dtype = embedding.dtype

    def _open_gguf(self, file: Path) -> None:
        self._metadata, places, files = gguf.read(file)
        raw = gguf_model.raw_config(self._metadata, places, str(file))
        self.config = parse_config(raw, str(file))
        self.quantization = "gguf"
        embedding = places["token_embd.weight"].stored
        self.dtype = embedding.dtype if embedding.dtype in DTYPE_BYTES else "bfloat16"
        self.raw_config = {**raw, "architectures": [ARCHITECTURES[0]], "dtype": self.dtype}
        if self.dummy:
            return
        self._shards = files
        self.weights = gguf_model.assemble(places, self.config)
        count = self.config.num_hidden_layers
        named = {gguf_model.fqn(name, count): place.stored for name, place in places.items()}
        self.tensors = {fqn: stored for fqn, stored in named.items() if fqn is not None}
        if len(self.tensors) < len(places):
            logger.info("%s: skipped %d mtp tensors", file, len(places) - len(self.tensors))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer: of a GGUF file the one in it, or tokenizer.json beside it.

        Raises:
            FormatError: There is none, or it is broken.
        """
        beside = (self.folder / "tokenizer.json").is_file()
        if self._gguf is None or (beside and not self.holds_tokenizer):
            return Tokenizer(self.folder)
        try:
            return gguf_tokenizer.read(self._metadata, self._gguf)
        except FormatError:
            if beside:
                return Tokenizer(self.folder)
            raise

    @property
    def holds_tokenizer(self) -> bool:
        """It is a GGUF file with a tokenizer in it."""
        return "tokenizer.ggml.tokens" in self._metadata

    def recipe(self, quantize: str | None = None) -> str:
        """The recipe that `quantize` means: a bundle's own where it is None, else "none".

        Raises:
            InvalidArgument: The bundle has another one.
        """
        if self.bundle is None:
            return quantize or "none"
        self.bundle.check_recipe(quantize or self.bundle.recipe)
        return self.bundle.recipe

    @property
    def identity(self) -> str:
        """Says which files these are: paths, sizes, modification times and the config.

        Engines of one process share weights when it is equal.

        Raises:
            FormatError: A file is gone since the checkpoint was opened.
        """
        if self.dummy:
            return f"dummy-{self.config.hash}-{self.dtype}"
        digest = hashlib.sha256(self.config.hash.encode())
        with _still_readable():
            for shard in self._shards:
                status = shard.stat()
                about = f"\n{shard.resolve()} {status.st_size} {status.st_mtime_ns}"
                digest.update(about.encode())
        return digest.hexdigest()

    @property
    def fingerprint(self) -> str:
        """Says what the files hold, wherever they lie: headers and samples of every shard.

        A saved session names it, so a copied or moved checkpoint still opens it, and a bundle has
        that of its source.

        Raises:
            FormatError: A file is gone since the checkpoint was opened.
        """
        if self.dummy:
            return self.identity
        if self.bundle is not None:  # the same recipe gives the same bits
            return self.bundle.source
        digest = hashlib.sha256(self.config.hash.encode())
        with _still_readable():
            for shard in self._shards:
                _sample(shard, digest)
        return digest.hexdigest()

    def sources(self, slots: Iterable[_core.TensorSlot]) -> dict[str, Weight]:
        """Find every slot of the core among the weights; check names, shapes and dtypes.

        Raises:
            FormatError: Tensors are missing, or one has another shape or dtype.
        """
        found: dict[str, Weight] = {}
        missing: list[str] = []
        for slot in slots:
            if slot.fqn in found:
                continue
            weight = self._source(slot, missing)
            if weight is not None:
                self._check(slot, weight)
                found[slot.fqn] = weight
        if missing:
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FormatError(
                f"{self._origin()}: {len(missing)} of the model's tensors are missing: {shown}"
            )
        self._report_unused(tensor.name for weight in found.values() for tensor in weight.tensors())
        return found

    def _origin(self) -> Path:
        if self._gguf is not None:
            return self._gguf
        index = self.path / _INDEX
        return index if index.is_file() else self.path / _SINGLE

    def _read_headers(self) -> None:
        index = self.path / _INDEX
        if index.is_file():
            placed = _weight_map(index)
            self._shards = [self.path / name for name in sorted(set(placed.values()))]
        elif (self.path / _SINGLE).is_file():
            placed = {}
            self._shards = [self.path / _SINGLE]
        else:
            raise FormatError(f"{self.path}: holds neither {_SINGLE} nor {_INDEX}")
        headers = {shard.name: read_header(shard) for shard in self._shards}
        if not placed:
            placed = dict.fromkeys(headers[_SINGLE], _SINGLE)
        for name, shard_name in placed.items():
            if name not in headers[shard_name]:
                raise FormatError(
                    f"{self.path / shard_name}: holds no tensor {name}, which {_INDEX} places there"
                )
            fqn = _strip(name)
            if fqn in self.tensors:
                raise FormatError(
                    f"{self.path / shard_name}: {name} and {self.tensors[fqn].name} are the same"
                )
            self.tensors[fqn] = headers[shard_name][name]

    def _source(self, slot: _core.TensorSlot, missing: list[str]) -> Weight | None:
        """The weight of one slot; names that are not there go to `missing`."""
        name = slot.fqn
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            name = "embed_tokens.weight"
        if name in self.weights:
            return self.weights[name]
        experts, _, kind = name.rpartition(".")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind)
        if parts is None or not experts.endswith(".experts"):
            missing.append(name)
            return None
        if not any(f"{experts}.{index}.{parts[0]}.weight" in self.weights for index in (0, 1)):
            missing.append(name)
            return None
        rows = []
        for index in range(slot.shape[0]):
            names = [f"{experts}.{index}.{part}.weight" for part in parts]
            missing.extend(name for name in names if name not in self.weights)
            rows.append(tuple(self.weights[name] for name in names if name in self.weights))
        complete = all(len(row) == len(parts) for row in rows)
        return StackedExperts(name, tuple(rows)) if complete else None

    def _check(self, slot: _core.TensorSlot, weight: Weight) -> None:
        shape = tuple(slot.shape)
        parts = [weight]
        if isinstance(weight, StackedExperts):
            parts = list(weight.leaves())
            shape = (shape[1] * len(weight.parts) // len(parts), *shape[2:])
        large = len(slot.shape) > 1 and not _is_small(slot.fqn)
        for part in parts:
            if part.shape != shape:
                raise FormatError(f"{part.describe()}: the config needs shape {list(shape)}")
            if part.dtype not in DTYPE_BYTES:
                raise FormatError(
                    f"{part.describe()}: the dtype must be one of {', '.join(DTYPE_BYTES)}"
                )
            if large and isinstance(part, StoredTensor) and part.dtype != self.dtype:
                raise FormatError(
                    f"{part.describe()}: the embedding is {self.dtype}; large matrices of one "
                    "checkpoint must share a dtype"
                )

    def _report_unused(self, used: Iterable[str]) -> None:
        known = set(used)
        rest = [tensor.name for tensor in self.tensors.values() if tensor.name not in known]
        skipped = [name for name in rest if name.startswith(_SKIPPED)]
        if skipped:
            vision = sum("visual." in name for name in skipped)
            logger.info(
                "%s: skipped %d vision and %d mtp tensors", self.path, vision, len(skipped) - vision
            )
        unknown = [name for name in rest if not name.startswith(_SKIPPED)]
        for name in unknown:
            expert = _EXPERT.fullmatch(_strip(name))
            if expert and int(expert[2]) >= self.config.num_experts:
                raise FormatError(
                    f"{self.tensors[_strip(name)].describe()}: the config has "
                    f"{self.config.num_experts} experts in a layer"
                )
        if unknown:
            shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            logger.warning("%s: ignored %d unknown tensors: %s", self.path, len(unknown), shown)


def _strip(name: str) -> str:
    if name.startswith(_SKIPPED):
        return name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _is_small(fqn: str) -> bool:
    """Matrices that recipes keep exact, and the taps of the convolution: any dtype will do."""
    return fqn.endswith(
        ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "mlp.gate.weight", "_gate.weight")
    )


def _weight_map(index: Path) -> dict[str, str]:
    placed = load_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise FormatError(f"{index}: weight_map must name the file of every tensor")
    for name, shard in placed.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise FormatError(f"{index}: {name} is placed in {shard!r}, which is no file name")
    return placed


def _config_dtype(raw: dict[str, Any], file: Path) -> str:
    """The dtype that config.json states; bfloat16 when it states none."""
    text = text_config(raw)
    stated = text.get("dtype") or text.get("torch_dtype") or raw.get("dtype")
    dtype = stated or raw.get("torch_dtype") or "bfloat16"
    if dtype not in DTYPE_BYTES:
        raise InvalidArgument(
            f"{file}: dtype is {dtype!r}; this engine runs {', '.join(DTYPE_BYTES)}"
        )
    return str(dtype)


@contextlib.contextmanager
def _still_readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FormatError(f"the checkpoint cannot be read any more: {error}") from error


def _sample(file: Path, digest: hashlib._Hash, pieces: int = 64, piece_bytes: int = 4096) -> None:
    """Hash the size, the header and evenly spaced pieces of a file."""
    size = file.stat().st_size
    digest.update(f"\n{size}".encode())
    with file.open("rb") as opened:
        header_bytes = 8 + int.from_bytes(opened.read(8), "little")
        if file.suffix == ".gguf":  # where its header ends only the whole of it says
            header_bytes = min(size, 1 << 20)
        opened.seek(0)
        digest.update(opened.read(header_bytes))
        for index in range(pieces):
            opened.seek(header_bytes + (size - header_bytes) * index // pieces)
            digest.update(opened.read(piece_bytes))
