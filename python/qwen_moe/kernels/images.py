"""Images of kernels: compiled without a GPU, written with a manifest, read back with every check.

An image that does not fit is never used: a manifest names the source, the Triton version and the
architecture that it was made from, and every file's hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

    from .specs import Spec

MANIFEST = "manifest.json"
VERSION = 2
PACKAGED = Path(__file__).parent / "images"  # what a build with Triton leaves here
BITS = {"i32": 32, "i64": 64, "fp32": 32}
_PTX_MEMORY = re.compile(r"\b(ld\.global|st\.global|cp\.async|red\.|atom\.)[.\w]*")
_PTX_PRODUCTS = re.compile(r"wgmma\.wait_group\.sync\.aligned (\d+)")
_PTX_PARAMETER = re.compile(r"\.param\s+\.[a-z]+(\d+)\s[^,)]*_param_(\d+)")


class ImageError(RuntimeError):
    """No image, or one that does not fit."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a launch needs, as plain fields.

    Attributes:
        name: Of the spec.
        symbol: Of the kernel in `code`.
        code: A cubin.
        shared: Bytes of dynamic shared memory.
        warps: Of a block.
        params: Name and type of every argument, in order.
        constants: What it was compiled for, such as rows and outputs of a block.
        scratch: Pointers that Triton appends to the arguments; null for these kernels.
        overlaps: May be launched before its predecessor has ended; it waits for that itself.
    """

    name: str
    symbol: str
    code: bytes
    shared: int
    warps: int
    params: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    scratch: int
    overlaps: bool


def source_hash() -> str:
    """Of every file of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def triton_version() -> str:
    """Of the Triton that is installed.

    Raises:
        ImageError: There is none.
    """
    try:
        import triton
    except ImportError as error:
        raise ImageError(
            "the prefill kernels are not compiled and Triton is not installed; "
            "install it (`pip install triton`) or build the package where it is"
        ) from error
    return str(triton.__version__)


def parameter_bits(kind: str) -> int:
    """Width of an argument of a type of `specs`."""
    return 64 if kind.startswith("*") else BITS[kind.split("/")[0]]


def check_parameters(ptx: str, params: Sequence[tuple[str, str]]) -> int:
    """Compares the arguments with those of the PTX; returns how many Triton appended.

    Raises:
        ImageError: They differ by more than pointers at the end.
    """
    header = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    found = [int(bits) for bits, _ in _PTX_PARAMETER.findall(header)]
    wanted = [parameter_bits(kind) for _, kind in params]
    extra = found[len(wanted) :]
    if found[: len(wanted)] != wanted or len(extra) > 2 or any(bits != 64 for bits in extra):
        raise ImageError(
            f"the kernel takes parameters of {found} bits, expected {wanted} and at most two "
            "pointers behind them: this Triton has another calling convention"
        )
    return len(extra)


def waits_first(ptx: str) -> bool:
    """Whether the kernel waits for its predecessor, before it touches memory.

    Raises:
        ImageError: It reads or writes first.
    """
    wait = ptx.find("griddepcontrol.wait")
    touch = _PTX_MEMORY.search(ptx)
    if wait >= 0 and touch is not None and touch.start() < wait:
        raise ImageError(f"the kernel has {touch[0]} before it waits for its predecessor")
    return wait >= 0


def check_products(ptx: str) -> None:
    """Every product on the tensor cores is waited for before anything else.

    One that is in flight may still read registers that the loop writes over (interpreted.py,
    `finished`); whether it does shows in some tiles, sometimes.

    Raises:
        ImageError: The compiler left some in flight.
    """
    left = [int(count) for count in _PTX_PRODUCTS.findall(ptx)]
    if any(left):
        raise ImageError(f"the kernel leaves up to {max(left)} products in flight")


@dataclass(frozen=True)
class _AheadOfTime:
    """What a kernel's source learns of the device it is compiled for, in a GPU's absence."""

    target: GPUTarget

    def get_current_target(self) -> GPUTarget:
        return self.target


@contextlib.contextmanager
def _compiling_for(target: GPUTarget) -> Iterator[None]:
    from triton.runtime import driver

    before = driver._active
    driver.set_active(_AheadOfTime(target))
    try:
        yield
    finally:
        driver._active = before


def compile_spec(spec: Spec, arch: int) -> Image:
    """Compiles one kernel for compute capability `arch` / 10; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kind.split("/")[0] for name, kind in spec.types.items()}
    signature |= dict.fromkeys(spec.constants, "constexpr")
    names = list(spec.kernel.arg_names)
    if names != list(signature):
        raise ImageError(f"{spec.name} takes {names}, the table has {list(signature)}")
    aligned = {
        name
        for name, kind in spec.types.items()
        if kind.endswith("/16") or (kind.startswith("*") and "/" not in kind)
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned
    }
    source = ASTSource(spec.kernel, signature, dict(spec.constants), attributes)
    target = GPUTarget("cuda", arch, 32)
    with _compiling_for(target):
        made = triton.compile(
            source,
            target=target,
            options={
                "num_warps": spec.warps,
                "num_stages": spec.stages,
                "enable_fp_fusion": True,
            },
        )
    check_products(made.asm["ptx"])
    about = made.metadata
    scratch = about.global_scratch_size + getattr(about, "profile_scratch_size", 0)
    if scratch or about.num_ctas != 1:
        raise ImageError(f"{spec.name} wants {scratch} bytes of scratch, clusters {about.num_ctas}")
    params = tuple(spec.types.items())
    return Image(
        name=spec.name,
        symbol=about.name,
        code=made.asm["cubin"],
        shared=about.shared,
        warps=about.num_warps,
        params=params,
        constants=tuple((k, int(v)) for k, v in spec.constants.items() if isinstance(v, int)),
        scratch=check_parameters(made.asm["ptx"], params),
        overlaps=waits_first(made.asm["ptx"]),
    )


def write(folder: Path, images: Sequence[Image], arch: int) -> None:
    """Writes images and manifest; the folder appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        new = Path(made) / "new"
        new.mkdir()
        kernels = []
        for image in images:
            (new / f"{image.name}.cubin").write_bytes(image.code)
            entry = {key: value for key, value in asdict(image).items() if key != "code"}
            kernels.append({**entry, "sha256": hashlib.sha256(image.code).hexdigest()})
        manifest = {
            "version": VERSION,
            "arch": arch,
            "triton": triton_version(),
            "source": source_hash(),
            "kernels": kernels,
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)


def read(folder: Path, arch: int) -> list[Image]:
    """The images of a folder.

    Raises:
        ImageError: There are none, or they were made from another source or for another device.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ImageError(f"no kernel images in {folder}") from error
    expected = {"version": VERSION, "arch": arch, "source": source_hash()}
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise ImageError(
                f"the kernel images in {folder} have {key} {manifest.get(key)}, expected {value}"
            )
    images = []
    for entry in manifest["kernels"]:
        code = (folder / f"{entry['name']}.cubin").read_bytes()
        if hashlib.sha256(code).hexdigest() != entry.pop("sha256"):
            raise ImageError(f"{entry['name']}.cubin in {folder} is not what the manifest names")
        params = tuple((name, kind) for name, kind in entry.pop("params"))
        constants = tuple((name, value) for name, value in entry.pop("constants"))
        images.append(Image(code=code, params=params, constants=constants, **entry))
    return images


def build(
    folder: Path,
    arch: int,
    *,
    only: str = "",
    share: tuple[int, int] = (0, 1),
    progress: Callable[[str], None] = lambda _: None,
) -> list[Image]:
    """Compiles the table into a folder.

    Args:
        folder: Where images and manifest go.
        arch: Compute capability, 90 for 9.0.
        only: Kernels whose name contains this.
        share: (i, n): every n-th kernel from the i-th on.
        progress: Told what is done next.
    """
    triton_version()
    from .specs import specs

    table = [spec for spec in specs() if only in spec.name][share[0] :: share[1]]
    images = []
    for i, spec in enumerate(table):
        progress(f"compiling kernels for sm_{arch}: {i + 1}/{len(table)} {spec.name}")
        images.append(compile_spec(spec, arch))
    write(folder, images, arch)
    return images


def build_parallel(
    folder: Path,
    arch: int,
    jobs: int,
    *,
    only: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> list[Image]:
    """As `build`, in processes of their own: a compiler takes one core."""
    triton_version()
    with tempfile.TemporaryDirectory() as made:
        parts = [Path(made) / str(i) for i in range(jobs)]
        compiler = [sys.executable, "-W", "ignore", str(Path(__file__).parent / "standalone.py")]
        images = []
        with contextlib.ExitStack() as stack:
            running = []
            for i, part in enumerate(parts):
                command = [*compiler, f"--arch={arch}", f"--out={part}", f"--only={only}"]
                command.append(f"--share={i}/{jobs}")
                process = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
                )
                running.append(stack.enter_context(process))
                stack.callback(process.kill)  # where another one fails
            for i, (process, part) in enumerate(zip(running, parts, strict=True)):
                progress(f"compiling kernels for sm_{arch}: part {i + 1} of {jobs}")
                _, said = process.communicate()
                if process.returncode:
                    raise ImageError(f"compiling the prefill kernels failed:\n{said[-2000:]}")
                images += read(part, arch)
    write(folder, images, arch)
    return images


def cache_folder(arch: int) -> Path:
    """Where images that were compiled on first use are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = f"{source_hash()[:16]}-triton{triton_version()}-sm{arch}"
    return Path(root) / "qwen_moe" / "kernels" / key


def load(arch: int, progress: Callable[[str], None] = lambda _: None) -> list[Image]:
    """Images for a device: those of the package, else cached ones, else compiled now."""
    try:
        return read(PACKAGED / f"sm{arch}", arch)
    except ImageError:
        folder = cache_folder(arch)
    try:
        return read(folder, arch)
    except ImageError:
        return build_parallel(folder, arch, min(16, os.cpu_count() or 1), progress=progress)
