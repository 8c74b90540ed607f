"""The prefill kernels: against torch in Triton's interpreter, and compiled with no GPU."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from qwen_moe.kernels import images
from qwen_moe.kernels.specs import TILES, Spec, specs

HERE = Path(__file__).parent


def table() -> dict[str, Spec]:
    return {spec.name: spec for spec in specs()}


def test_kernels_agree_with_torch_in_the_interpreter() -> None:
    # The interpreter must be chosen before Triton is imported, which this process may have done.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "triton_kernels.py"],
        cwd=HERE,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_a_kernel_is_compiled_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "qwen_moe.kernels",
            "--arch=90",
            f"--out={tmp_path / 'images'}",
            "--only=rms_norm_2048",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "images" / "manifest.json").read_text())
    assert (manifest["arch"], manifest["source"]) == (90, images.source_hash())
    (kernel,) = manifest["kernels"]
    code = (tmp_path / "images" / "rms_norm_2048.cubin").read_bytes()
    assert code.startswith(b"\x7fELF")
    assert kernel["sha256"] == hashlib.sha256(code).hexdigest()
    spec = table()["rms_norm_2048"]
    assert kernel["params"] == [list(item) for item in spec.types.items()]
    assert (kernel["symbol"], kernel["warps"]) == ("rms_norm", spec.warps)
    assert kernel["constants"] == [["BLOCK", 2048]]
    assert kernel["scratch"] in (0, 1, 2)
    assert kernel["overlaps"], "it does not wait for the kernel before it"
    assert images.read(tmp_path / "images", 90)[0].code == code


@pytest.mark.parametrize("arch", [80, 90])
def test_a_product_is_compiled_with_every_check(arch: int) -> None:
    image = images.compile_spec(table()["expert_down_int4_g128_m128"], arch)
    assert image.shared <= {80: 163, 90: 227}[arch] << 10
    assert image.overlaps == (arch == 90)


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    with pytest.raises(images.ImageError, match="no kernel images"):
        images.read(folder, 90)
    image = images.Image("one", "one", b"code", 0, 4, (("x", "*fp32"),), (("BM", 16),), 2, True)
    images.write(folder, [image], 90)
    assert images.read(folder, 90) == [image]
    with pytest.raises(images.ImageError, match="have arch 90, expected 100"):
        images.read(folder, 100)
    (folder / "one.cubin").write_bytes(b"edoc")
    with pytest.raises(images.ImageError, match="is not what the manifest names"):
        images.read(folder, 90)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "source": "another"}))
    with pytest.raises(images.ImageError, match="have source another"):
        images.read(folder, 90)


def test_arguments_are_compared_with_the_ptx() -> None:
    ptx = """.visible .entry f(
        .param .u64 .ptr .global .align 1 f_param_0,
        .param .f32 f_param_1,
        .param .u64 .ptr .global .align 1 f_param_2,
        .param .u64 .ptr .global .align 1 f_param_3
    )
    {"""
    assert images.check_parameters(ptx, [("x", "*fp32"), ("eps", "fp32")]) == 2
    with pytest.raises(images.ImageError, match="another calling convention"):
        images.check_parameters(ptx, [("x", "*fp32")])
    with pytest.raises(images.ImageError, match="another calling convention"):
        images.check_parameters(ptx, [("x", "*fp32"), ("n", "i64")])


def test_a_kernel_that_may_overlap_waits_before_it_reads() -> None:
    wait, load = "griddepcontrol.wait; // 1\n", "ld.global.b32 { %r1 }, [ %rd1 + 0 ];\n"
    assert images.waits_first(wait + load)
    assert not images.waits_first(load)
    with pytest.raises(images.ImageError, match=r"ld.global.b32 before it waits"):
        images.waits_first(load + wait)


def test_a_product_must_not_be_left_in_flight() -> None:
    images.check_products("wgmma.wait_group.sync.aligned 0;")
    with pytest.raises(images.ImageError, match="up to 3 products in flight"):
        images.check_products("wgmma.wait_group.sync.aligned 0;\nwgmma.wait_group.sync.aligned 3;")


def test_the_table_names_every_kernel_once() -> None:
    names = [spec.name for spec in specs()]
    assert len(set(names)) == len(names)
    for spec in specs():
        assert spec.kernel.arg_names == [*spec.types, *spec.constants], spec.name


def test_the_core_launches_what_the_table_has() -> None:
    source = (HERE.parent / "csrc" / "cuda" / "prefill.cpp").read_text()
    every = table()
    first = "rms|project|conv|delta|attention|top|plan|sort|expert|combine"
    wanted = set(re.findall(rf'"((?:{first})[a-z0-9_]*)"', source))
    for name in wanted:
        assert any(known.startswith(name) for known in every), name
    kernels = {spec.kernel.__name__ for spec in specs()}
    assert all(any(name.startswith(k) for name in wanted) for k in kernels)

    # The tile is part of the name, so that the core can choose it; it tries them in order.
    tried = re.search(r"kTiles\[\] = \{(.*?)\};", source, re.DOTALL)
    assert tried is not None
    sizes = [(int(a), int(b)) for a, b in re.findall(r"\{(\d+), (\d+)\}", tried[1])]
    assert sizes == [(tile.rows, tile.outputs) for tile in TILES]
    for spec in specs():
        if match := re.fullmatch(r"expert\w*_m(\d+)", spec.name):
            assert spec.constants["BM"] == int(match[1])
        if match := re.fullmatch(r"project\w*_(\d+)x(\d+)", spec.name):
            halves = 2 if "pair" in spec.name else 1
            assert spec.constants["BM"] == int(match[1])
            assert spec.constants["BN"] * halves == int(match[2])

    # Arguments of the launches by one name, counted.
    counted = re.findall(r'launch\(\s*"(\w+)",.*?\{(.*?)\}\);', source, re.DOTALL)
    assert len(counted) >= 8
    for name, arguments in counted:
        while "(" in arguments or "<" in arguments:
            arguments = re.sub(r"<[^<>]*>|\([^()]*\)", "", arguments)
        assert arguments.count(",") + 1 == len(every[name].types), name
