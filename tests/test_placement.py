"""Which devices an engine takes, and what it brings to them."""

import pytest

import qwen_moe
from qwen_moe import _core, placement, prefill_kernels
from qwen_moe.kernels.images import Image, ImageError

IMAGE = Image(
    name="rms_norm",
    symbol="rms_norm",
    code=b"\x7fELF\x00\xff",
    shared=16,
    warps=4,
    params=(("out", "*bf16"), ("columns", "i32/16")),
    constants=(("BLOCK", 1024),),
    scratch=2,
    overlaps=True,
)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    capability = {0: "9.0", 1: "9.0"}
    monkeypatch.setattr(_core, "cuda_available", lambda: True)
    monkeypatch.setattr(
        _core, "cuda_device_info", lambda index: {"compute_capability": capability[index]}
    )
    return capability


@pytest.mark.usefixtures("two_gpus")
def test_layers_are_spread_over_devices_of_one_kind() -> None:
    assert placement.resolve_devices("auto", ["cuda", "cuda:1"]) == ["cuda:0", "cuda:1"]
    assert placement.resolve_devices("auto", ["cpu", "cpu"]) == ["cpu", "cpu"]
    with pytest.raises(qwen_moe.InvalidArgument, match="all be CPUs or all be GPUs"):
        placement.resolve_devices("auto", ["cpu", "cuda"])


def test_a_cpu_needs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_kernels.images, "load", lambda *_: pytest.fail("loaded"))
    assert prefill_kernels.prefill_images(["cpu", "cpu"]) == []
    with qwen_moe.Engine(device="cpu", prefill_kernels=True) as engine:
        assert engine.generate("Once", qwen_moe.SamplingParams(max_tokens=2))[0].token_ids


@pytest.mark.usefixtures("two_gpus")
def test_kernels_are_those_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        prefill_kernels.images, "load", lambda arch, _: asked.append(arch) or [IMAGE]
    )
    (image,) = prefill_kernels.prefill_images(["cuda:0", "cuda:1"])
    assert image.name == "rms_norm"
    assert asked == [90]


def test_gpus_of_two_kinds_and_missing_kernels_are_refused(
    two_gpus: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> list[Image]:
        raise ImageError("no manifest")

    monkeypatch.setattr(prefill_kernels.images, "load", missing)
    with pytest.raises(qwen_moe.DeviceError, match=r"no manifest.*Install Triton"):
        prefill_kernels.prefill_images(["cuda:0"])
    two_gpus[1] = "8.0"
    with pytest.raises(qwen_moe.DeviceError, match="one kind"):
        prefill_kernels.prefill_images(["cuda:0", "cuda:1"])
