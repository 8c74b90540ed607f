"""`qwen-moe quantize`: a checkpoint, packed once, as a bundle that loads without packing."""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_moe import _core, bundle, info, loading
from qwen_moe.bundle_writer import ShardWriter, appearing, check_free, partial_of, sync
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.errors import FormatError, InvalidArgument
from qwen_moe.placement import resolve_devices
from qwen_moe.plan import Plan, plan, report

logger = logging.getLogger("qwen_moe")

RECIPES = ("int4", "int4-all", "int8")
# Taken over from the source as they are, where they are there.
GENERATION = ("generation_config.json",)
COPIED = (
    *GENERATION,
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
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="checkpoint directory or GGUF file"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument(
        "--group", type=int, metavar="N", help="input features per scale: 32 (CPU), 64 or 128"
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle at OUT")
    parser.add_argument(
        "--device", default="auto", help="what quantizes: auto, cpu, cuda or cuda:N; same bytes"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")


def run(args: argparse.Namespace) -> None:
    """Write the bundle and say what it holds."""
    try:
        written = quantize(
            args.source,
            args.out,
            recipe=args.recipe,
            group=args.group,
            device=args.device,
            threads=args.threads,
            force=args.force,
        )
    except KeyboardInterrupt:
        partial = partial_of(args.out)
        if partial.is_dir():
            print(
                f"\ninterrupted; the same command goes on with what is in {partial}",
                file=sys.stderr,
            )
        raise
    print(f"{args.out}: {info.size(written)} of weights as {args.recipe}")


def quantize(
    source: Path,
    out: Path,
    *,
    recipe: str,
    group: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
    progress: bool | None = None,
    load_format: str = "auto",
) -> int:
    """Pack a checkpoint as a bundle; one tensor is in memory at a time.

    Args:
        source: Whatever `Engine` opens, but a bundle.
        out: The directory to write. It appears at the end, whole. After Ctrl-C or a killed run the
            next one with the same arguments goes on where it stopped.
        recipe: int4, int4-all or int8.
        group: Input features that share a scale; see `Engine`. A GPU opens bundles of 64 and 128.
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
    planned = plan(checkpoint, recipe, ("cpu",), group)
    report(checkpoint, planned)
    total = sum(slot.bytes for slot in planned.slots)
    with appearing(out, replace=force) as folder:
        written = sum(file.stat().st_blocks * 512 for file in folder.glob("packed-*"))
        free = shutil.disk_usage(folder).free + written
        if free < total:
            raise InvalidArgument(
                f"{out}: the bundle takes {info.size(total)}; {info.size(free)} are free there"
            )
        _write_settings(checkpoint, folder)
        job = {
            "format": bundle.FORMAT,
            "version": bundle.VERSION,
            "recipe": recipe,
            "dtype": checkpoint.dtype,
            "group": planned.group,
            "source": checkpoint.fingerprint,
            "config": checkpoint.config.hash,
        }
        with ShardWriter(folder, planned.slots, job) as writer:
            tensors = _write_tensors(
                writer, planned, recipe, device, threads or len(os.sched_getaffinity(0)), progress
            )
        state = bundle.declared_state(checkpoint.config)
        manifest = {**job, "tensors": tensors, "state": state}
        with (folder / bundle.MANIFEST).open("wb") as file:
            file.write(json.dumps(manifest, indent=1).encode())
            sync(file)
    return total


def _write_tensors(
    writer: ShardWriter,
    planned: Plan,
    recipe: str,
    device: str,
    threads: int,
    progress: bool | None,
) -> dict[str, Mapping[str, Any]]:
    """Pack and write every tensor that is not there yet; gives the manifest's entries."""
    entries: dict[str, Mapping[str, Any]] = {}
    total = sum(slot.bytes for slot in planned.slots)
    label = f"writing as {recipe}"
    packer = _core.Packer(threads=threads, device=device)
    workers = loading.readers([device], threads)
    with loading.progress_bar(total, label, progress) as bar:
        for file, slot, kept in writer.open_each():
            if not kept:  # what was packed is freed before the next is allocated
                writer.write(slot, memoryview(_packed(planned, slot, packer, workers)))
            entries[slot.fqn] = {
                "file": file,
                "shape": slot.shape,
                "format": slot.format,
                "group": slot.group,
                "bytes": slot.bytes,
                "crc32": f"{writer.sums[slot.fqn]:08x}",
            }
            bar.update(slot.bytes)
    return entries


def _packed(
    planned: Plan, slot: _core.TensorSlot, packer: _core.Packer, workers: int
) -> _core.PackedTensor:
    packed = _core.PackedTensor(slot, packer)
    if not planned.sources:  # of a dummy
        packed.fill_random(loading.seed(slot.fqn))
        return packed
    pieces = loading.pieces(
        slot, planned.sources[slot.fqn], packed, coded=slot.fqn in planned.stored
    )
    for _ in loading.put_pieces(pieces, workers):
        pass
    return packed


def _write_settings(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and the tokenizer."""
    copied: tuple[str, ...] = COPIED
    if checkpoint.holds_tokenizer:  # then nothing beside the file is asked for one
        copied = GENERATION if checkpoint.path == checkpoint.folder else ()
    for name in copied:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if checkpoint.holds_tokenizer:
        try:
            checkpoint.tokenizer().save(folder)
        except FormatError as error:  # it can be opened, with prompts of ids
            logger.warning("the bundle has no tokenizer: %s", error)
    config = copy.deepcopy(checkpoint.raw_config)
    text = config.get("text_config")
    for part in (config, text):  # it describes tensors that a bundle does not have
        if isinstance(part, dict):
            part.pop("quantization_config", None)
    written = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(written, encoding="utf-8")
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
