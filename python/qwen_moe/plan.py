"""What every weight of a checkpoint becomes under a recipe, before anything is allocated."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwen_moe import _core
from qwen_moe.checkpoint import Checkpoint
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


def plan(checkpoint: Checkpoint, recipe: str, devices: Sequence[str]) -> Plan:
    """Find and check every tensor; reads headers only.

    Args:
        checkpoint: The opened checkpoint.
        recipe: none, int8, int4 or int4-all.
        devices: Where layers will be.

    Raises:
        FormatError: Tensors are missing, or one has another shape or dtype.
        InvalidArgument: A matrix cannot have the format that the recipe asks for.
    """
    config, dtype = checkpoint.config, checkpoint.dtype
    least = GROUPS[-1] if all(device == "cpu" for device in devices) else GPU_GROUP
    if checkpoint.bundle is not None:
        packed = checkpoint.bundle
        packed.check_recipe(recipe)
        packed.check_group(least)
        stored = packed.stored()
        slots = _core.plan(config, recipe, dtype, stored=stored, group=packed.group)
        packed.check(slots)
        return Plan(slots, {}, stored, packed.group)
    slots = _core.plan(config, recipe, dtype)
    if checkpoint.dummy:
        return Plan(slots, {}, {}, GROUPS[0])
    sources = checkpoint.sources(slots)
    found = {fqn: weight.codes for fqn, weight in sources.items()}
    codes = {fqn: c for fqn, c in found.items() if c is not None and c.group >= least}
    if not codes:
        return Plan(slots, sources, {}, GROUPS[0])
    formats = {fqn: c.format for fqn, c in codes.items()}
    slots = _core.plan(config, recipe, dtype, stored=formats, group=GROUPS[-1])
    # The core keeps no codes of the embedding and of the matrices that every recipe keeps exact.
    stored = {slot.fqn: slot.format for slot in slots if formats.get(slot.fqn) == slot.format}
    group = min((codes[fqn].group for fqn in stored), default=GROUPS[0])
    slots = _core.plan(config, recipe, dtype, stored=stored, group=group)
    return Plan(slots, sources, stored, group)


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
