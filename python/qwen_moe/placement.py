"""Which device holds which layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from qwen_moe import _core
from qwen_moe.errors import DeviceError, InvalidArgument


def resolve_devices(device: str, devices: Sequence[str] | None) -> list[str]:
    """Names for the core: `devices`, or `device` alone; "auto" is CUDA where there is some.

    Raises:
        InvalidArgument: A name means nothing, or both are given.
        DeviceError: CUDA is asked for and there is none.
    """
    if devices is not None:
        if isinstance(devices, str) or not devices:
            raise InvalidArgument(f"devices must be a list of device names, got {devices!r}")
        if device != "auto":
            raise InvalidArgument(f"pass device or devices, not both: {device!r}, {devices!r}")
    listed = [device] if devices is None else list(devices)
    names = [_device(name) for name in listed]
    if len({name.partition(":")[0] for name in names}) > 1:
        raise InvalidArgument(
            f"devices must all be CPUs or all be GPUs, got {names}: their states differ"
        )
    return names


def _device(name: str) -> str:
    if name == "auto":
        return "cuda:0" if _core.cuda_available() else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise InvalidArgument(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if not _core.cuda_available():
        raise DeviceError(
            f"device {name!r} was asked for, but there is no CUDA: either this build is without it "
            "or the machine has no usable GPU"
        )
    return f"cuda:{index or 0}"


def resolve_split(split: Sequence[int] | None, devices: int, layers: int) -> list[int]:
    """The first layer of every device but the first; shared out evenly when not given.

    Raises:
        InvalidArgument: The spans do not cover the layers, each device with at least one.
    """
    if devices > layers:
        raise InvalidArgument(f"{devices} devices for {layers} layers: each needs at least one")
    if split is None:
        return [layers * index // devices for index in range(1, devices)]
    cuts = [0, *split, layers]
    rising = all(isinstance(cut, int) for cut in cuts) and all(
        low < high for low, high in itertools.pairwise(cuts)
    )
    if len(split) != devices - 1 or not rising:
        raise InvalidArgument(
            f"split must name the first layer of every device but the first, rising within 1 to "
            f"{layers - 1}; got {list(split)} for {devices} devices and {layers} layers"
        )
    return list(split)
