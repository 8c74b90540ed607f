"""`qwen-moe quantize`: a checkpoint, packed once, as a bundle that loads without packing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe import _core, bundle, info, loading
from qwen_moe.bundle_writer import ShardWriter, appearing, check_free, sync
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.config import load_json
from qwen_moe.errors import InvalidArgument
from qwen_moe.placement import resolve_devices
from qwen_moe.plan import Plan, plan, report

RECIPES = ("int4", "int4-all", "int8")
# Taken over from the source as they are, where they are there.
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory")
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--force", action="store_true", help="replace a bundle at OUT")
    parser.add_argument(
        "--device", default="auto", help="what quantizes: auto, cpu, cuda or cuda:N; same bytes"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")


def run(args: argparse.Namespace) -> None:
    """Write the bundle and say what it holds."""
    written = quantize(
        args.source,
        args.out,
        recipe=args.recipe,
        device=args.device,
        threads=args.threads,
        force=args.force,
    )
    print(f"{args.out}: {info.size(written)} of weights as {args.recipe}")


def quantize(
    source: Path,
    out: Path,
    *,
    recipe: str,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
    load_format: str = "auto",
) -> int:
    """Pack a checkpoint as a bundle; one tensor is in memory at a time.

    Args:
        source: A directory that `Engine` opens, not a bundle and not a GGUF file.
        out: The directory to write. It appears at the end, whole.
        recipe: int4, int4-all or int8.
        device: What quantizes: "cpu", "cuda", "cuda:1", or "auto", which takes CUDA when there is
            some. The bundle is the same.
        threads: CPU threads that read and pack; None takes all.
        force: Replace a bundle at `out`.
        progress: Show a progress bar on stderr; None shows it on a terminal.
        load_format: As that of `Engine`; "dummy" writes random weights, to time real shapes.

    Returns:
        Bytes of the packed weights.

    Raises:
        FormatError: A tensor of the source is missing or broken.
        InvalidArgument: `out` is there already or cannot be written, or a setting cannot work.
    """
    if recipe not in RECIPES:
        raise InvalidArgument(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    device = resolve_devices(device, None)[0]
    check_free(out, replace=force)
    checkpoint = Checkpoint(source, load_format)
    if checkpoint.bundle is not None:
        raise InvalidArgument(f"{source}: it is a bundle already, packed as {checkpoint.recipe()}")
    if checkpoint.quantization == "gguf":
        raise InvalidArgument(f"{source}: a GGUF file cannot be made a bundle; open it as it is")
    planned = plan(checkpoint, recipe, ("cpu",))
    report(checkpoint, planned)
    total = sum(slot.bytes for slot in planned.slots)
    with appearing(out, replace=force) as folder:
        free = shutil.disk_usage(folder).free
        if free < total:
            raise InvalidArgument(
                f"{out}: the bundle takes {info.size(total)}; {info.size(free)} are free there"
            )
        _copy_settings(checkpoint.folder, folder)
        tensors = _write_tensors(
            planned, folder, recipe, device, threads or len(os.sched_getaffinity(0)), progress
        )
        manifest = {
            "format": bundle.FORMAT,
            "version": bundle.VERSION,
            "recipe": recipe,
            "dtype": checkpoint.dtype,
            "group": planned.group,
            "source": checkpoint.fingerprint,
            "config": checkpoint.config.hash,
            "tensors": tensors,
            "state": bundle.declared_state(checkpoint.config),
        }
        with (folder / bundle.MANIFEST).open("wb") as file:
            file.write(json.dumps(manifest, indent=1).encode())
            sync(file)
    return total


def _write_tensors(
    planned: Plan,
    folder: Path,
    recipe: str,
    device: str,
    threads: int,
    progress: bool | None,
) -> dict[str, Mapping[str, Any]]:
    """Pack and write every tensor; gives the manifest's entries."""
    entries: dict[str, Mapping[str, Any]] = {}
    total = sum(slot.bytes for slot in planned.slots)
    label = f"writing as {recipe}"
    packer = _core.Packer(threads=threads, device=device)
    workers = loading.readers([device], threads)
    with (
        loading.progress_bar(total, label, progress) as bar,
        ShardWriter(folder, planned.slots) as writer,
    ):
        for file, slot in writer.open_each():
            packed = _packed(planned, slot, packer, workers)
            data = memoryview(packed)
            writer.write(data)
            entries[slot.fqn] = {
                "file": file,
                "shape": slot.shape,
                "format": slot.format,
                "group": slot.group,
                "bytes": slot.bytes,
                "crc32": f"{_core.crc32(data):08x}",
            }
            bar.update(slot.bytes)
            del packed, data  # before the next one is allocated
    return entries


def _packed(
    planned: Plan, slot: _core.TensorSlot, packer: _core.Packer, workers: int
) -> _core.PackedTensor:
    packed = _core.PackedTensor(slot, packer)
    if not planned.sources:  # of a dummy
        packed.fill_random(loading.seed(slot.fqn))
        return packed
    pieces = loading.pieces(slot, planned.sources[slot.fqn], coded=slot.fqn in planned.stored)

    def put(data: memoryview, dtype: str, piece: loading.Piece) -> None:
        packed.put(data, dtype, piece.begin)

    for _ in loading.put_pieces(pieces, put, workers):
        pass
    return packed


def _copy_settings(source: Path, folder: Path) -> None:
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
    config = load_json(source / "config.json")
    text = config.get("text_config")
    for part in (config, text):  # it describes tensors that a bundle does not have
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    with (folder / "config.json").open("wb") as file:
        file.write(json.dumps(config, indent=2, ensure_ascii=False).encode())
        sync(file)
