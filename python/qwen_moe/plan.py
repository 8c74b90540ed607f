"""What every weight of a checkpoint becomes under a recipe, before anything is allocated."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_moe import _core
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.errors import InvalidArgument
from qwen_moe.weights import DTYPE_BYTES, GROUPS, Weight

logger = logging.getLogger("qwen_moe")

GPU_GROUP = 64  # the smallest group that the kernels of a GPU take


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor of a model.

    Attributes:
        slots: In reading order, as the core holds them.
        sources: Where each comes from, by FQN; empty for a dummy and for a bundle.
        stored: Format of the matrices whose codes and scales are kept, by FQN.
        group: The most input features that share a scale.
    """

    slots: Sequence[_core.TensorSlot]
    sources: Mapping[str, Weight]
    stored: Mapping[str, str]
    group: int


def plan(
    checkpoint: Checkpoint, recipe: str, devices: Sequence[str], group: int | None = None
) -> Plan:
    """Find and check every tensor; reads headers only.

    Args:
        checkpoint: The opened checkpoint.
        recipe: none, int8, int4 or int4-all.
        devices: Where layers will be.
        group: Input features that share a scale, fewer where that does not divide them. Codes of
            the checkpoint in smaller groups are not kept then. None keeps all that the devices
            take, and packs the others in the smallest group of these, 128 when there are none.

    Raises:
        FormatError: Tensors are missing, or one has another shape or dtype.
        InvalidArgument: A matrix cannot have the format that the recipe asks for, or the group.
    """
    config, dtype = checkpoint.config, checkpoint.dtype
    least = GROUPS[-1] if all(device == "cpu" for device in devices) else GPU_GROUP
    if group is not None:
        _check_group(checkpoint, recipe, group, least)
    most = group or GROUPS[0]
    if checkpoint.bundle is not None:
        packed = checkpoint.bundle
        packed.check_recipe(recipe)
        packed.check_group(least)
        stored = packed.stored()
        slots = _core.plan(config, recipe, dtype, stored=stored, group=packed.group)
        packed.check(slots)
        return Plan(slots, {}, stored, packed.group)
    slots = _core.plan(config, recipe, dtype, group=most)
    if checkpoint.dummy:
        return Plan(slots, {}, {}, most)
    sources = checkpoint.sources(slots)
    found = {fqn: weight.codes for fqn, weight in sources.items()}
    least = max(least, group or 0)
    codes = {fqn: c for fqn, c in found.items() if c is not None and c.group >= least}
    if not codes:
        return Plan(slots, sources, {}, most)
    formats = {fqn: c.format for fqn, c in codes.items()}
    slots = _core.plan(config, recipe, dtype, stored=formats, group=GROUPS[-1])
    # The core keeps no codes of the embedding and of the matrices that every recipe keeps exact.
    stored = {slot.fqn: slot.format for slot in slots if formats.get(slot.fqn) == slot.format}
    smallest = min((codes[fqn].group for fqn in stored), default=most)
    most = min(most, smallest)
    slots = _core.plan(config, recipe, dtype, stored=stored, group=most)
    return Plan(slots, sources, stored, most)


def _check_group(checkpoint: Checkpoint, recipe: str, group: int, least: int) -> None:
    if group not in GROUPS:
        raise InvalidArgument(
            f"group is how many input features share a scale: {', '.join(map(str, GROUPS))}; got "
            f"{group!r}"
        )
    if group < least:
        raise InvalidArgument(
            f'group={group}: a GPU takes groups of at least {least}; take that, or device="cpu"'
        )
    if recipe == "none":
        raise InvalidArgument(f"group={group} says nothing without quantize")
    if checkpoint.bundle is not None and checkpoint.bundle.group != group:
        raise InvalidArgument(
            f"{checkpoint.path}: the bundle was packed in groups of {checkpoint.bundle.group} and "
            f"cannot be opened with group={group}; leave group out, or open the checkpoint that it "
            "was made from"
        )


def report(checkpoint: Checkpoint, planned: Plan) -> None:
    """Log what becomes of the matrices that the checkpoint holds quantized."""
    formats = {slot.fqn: slot.format for slot in planned.slots}
    lost = [
        formats[fqn]
        for fqn, weight in planned.sources.items()
        if fqn not in planned.stored and any(t.dtype not in DTYPE_BYTES for t in weight.tensors())
    ]
    packed = sum(form in ("int8", "int4") for form in lost)
    where = (checkpoint.path, checkpoint.quantization)
    if planned.stored:
        logger.info(
            "%s: codes and scales of %d %s matrices are kept as they are",
            where[0],
            len(planned.stored),
            where[1],
        )
    if len(lost) > packed:
        logger.info(
            "%s: %d %s matrices are dequantized to %s",
            where[0],
            len(lost) - packed,
            where[1],
            checkpoint.dtype,
        )
    if packed:
        logger.warning(
            "%s: %d %s matrices are dequantized and quantized again, which adds to their error",
            where[0],
            packed,
            where[1],
        )
