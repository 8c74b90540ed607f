"""The kernels that a GPU takes prompts through, as the core wants them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen_moe import _core
from qwen_moe.errors import DeviceError
from qwen_moe.kernels import images


def prefill_images(devices: Sequence[str]) -> list[_core.KernelImage]:
    """Compiled kernels for the CUDA devices among `devices`; none where there are none.

    They come with the package, or from a cache, or are compiled now, which takes Triton and about a
    minute.

    Args:
        devices: Names as the core knows them: "cpu" or "cuda:N".

    Raises:
        DeviceError: The devices differ in architecture, or there is no image and no Triton.
    """
    numbers = [int(name.removeprefix("cuda:")) for name in devices if name != "cpu"]
    arches = {_arch(_core.cuda_device_info(number)) for number in numbers}
    if not arches:
        return []
    if len(arches) > 1:
        raise DeviceError(f"prefill_kernels takes GPUs of one kind, got sm_{sorted(arches)}")
    (arch,) = arches
    try:
        found = images.load(arch, lambda line: print(line, file=sys.stderr))
    except (images.ImageError, ImportError) as error:
        raise DeviceError(
            f"no kernels for prompts on sm_{arch}: {error}. Install Triton, or open the engine "
            "with prefill_kernels=False, which takes prompts token by token"
        ) from error
    return [core_image(image) for image in found]


def core_image(image: images.Image) -> _core.KernelImage:
    """The core's form of an image."""
    return _core.KernelImage(
        name=image.name,
        symbol=image.symbol,
        code=image.code,
        shared=image.shared,
        warps=image.warps,
        params=image.params,
        constants=image.constants,
        scratch=image.scratch,
        overlaps=image.overlaps,
    )


def _arch(info: dict[str, str]) -> int:
    """90 for a device of compute capability 9.0."""
    return int(info["compute_capability"].replace(".", ""))
