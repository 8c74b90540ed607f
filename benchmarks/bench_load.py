"""Loading a bundle and a checkpoint, next to what the files and the bus could give.

Writes a bundle of random weights in the shapes of a preset, reads its files from the page cache
with all threads, copies pinned memory to the GPU, and loads the bundle; all in one run, so that
times can be given as shares of the slower of the two rates. With --layers also a bfloat16
checkpoint of that many layers of the preset, loaded as int4.

    python benchmarks/bench_load.py --preset 35b-a3b --device cuda --layers 8 --json load.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen_moe import _core, loading
from qwen_moe.bench import PRESETS
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.engine import EMBEDDED, Engine
from qwen_moe.placement import resolve_devices
from qwen_moe.quantize import quantize

PIECE = 8 << 20
COPY_BYTES = 256 << 20
GIB = float(1 << 30)


class Gpu:
    """What the driver says of one GPU; its library alone is needed."""

    def __init__(self, index: int) -> None:
        """Make its primary context current."""
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.attach()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} failed: {status}")

    def attach(self) -> None:
        """Make the context current on this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def used(self) -> int:
        """Bytes of its memory that are taken."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def copy_rate(self, repeat: int = 8) -> float:
        """Bytes per second from pinned host memory."""
        host, device = ctypes.c_void_p(), ctypes.c_uint64()
        size = ctypes.c_size_t(COPY_BYTES)
        self._call("cuMemHostAlloc", ctypes.byref(host), size, 0)
        self._call("cuMemAlloc_v2", ctypes.byref(device), size)
        try:
            rates = []
            for _ in range(repeat):
                began = time.perf_counter()
                self._call("cuMemcpyHtoD_v2", device, host, size)
                rates.append(COPY_BYTES / (time.perf_counter() - began))
            return statistics.median(rates)
        finally:
            self._call("cuMemFree_v2", device)
            self._call("cuMemFreeHost", host)


class Peaks:
    """The most memory above what there was before, sampled while something runs."""

    def __init__(self, gpu: Gpu | None) -> None:
        """Nothing was sampled yet."""
        self._gpu = gpu
        self.host = self.device = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Sample every few milliseconds within."""
        stop = threading.Event()
        before = host_bytes(), self._gpu.used() if self._gpu else 0

        def sample() -> None:
            if self._gpu:
                self._gpu.attach()
            ended = False
            while True:
                self.host = max(self.host, host_bytes() - before[0])
                if self._gpu:
                    self.device = max(self.device, self._gpu.used() - before[1])
                if ended:
                    return
                ended = stop.wait(0.005)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield
        finally:
            stop.set()
            sampler.join()


def host_bytes() -> int:
    """Memory of this process without the page cache: RssAnon, and what the core has pinned.

    Pinned memory is the driver's and no part of RssAnon; should a driver take it from there, it is
    counted twice: too much, never too little.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 + _core.cuda_pinned_bytes()
    return 0


def read_rate(files: Sequence[Path], threads: int) -> float:
    """Bytes per second of reading files with all threads, each into its own memory."""
    pieces = [(file, at) for file in files for at in range(0, file.stat().st_size, PIECE)]
    local = threading.local()

    def read(piece: tuple[int, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = bytearray(PIECE)
        return os.preadv(piece[0], [local.buffer], piece[1])

    with contextlib.ExitStack() as stack, ThreadPoolExecutor(threads) as pool:
        opened = {f: stack.enter_context(f.open("rb", buffering=0)).fileno() for f in files}
        began = time.perf_counter()
        total = sum(pool.map(read, [(opened[file], at) for file, at in pieces]))
        return total / (time.perf_counter() - began)


def preset(name: str, layers: int | None = None) -> dict[str, Any]:
    """The config of a model, with the first layers only if so asked."""
    if name == "tiny":
        config: dict[str, Any] = json.loads((EMBEDDED / "config.json").read_text())
    else:
        config = dict(PRESETS[name])
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    return config


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """A bfloat16 checkpoint of random weights, a file for each layer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(folder, "dummy")
    block = torch.randn(1 << 24).mul_(0.02).bfloat16()
    groups: dict[str, list[_core.TensorSlot]] = {}
    for slot in _core.plan(checkpoint.config, "none", "bfloat16"):
        parts = slot.fqn.split(".")
        groups.setdefault(parts[1] if parts[0] == "layers" else "top", []).append(slot)
    placed = {}

    def write(item: tuple[str, list[_core.TensorSlot]]) -> None:
        file = f"part-{item[0]}.safetensors"
        tensors = {}
        for slot in item[1]:
            count = torch.Size(slot.shape).numel()
            values = block.repeat(-(-count // len(block)))[:count] if count > len(block) else block
            tensors[f"model.{slot.fqn}"] = values[:count].clone().view(list(slot.shape))
            placed[f"model.{slot.fqn}"] = file
        save_file(tensors, folder / file)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, groups.items()))
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(
    path: Path, recipe: str | None, device: str, threads: int, repeat: int, gpu: Gpu | None
) -> dict[str, Any]:
    """Load one directory several times; times of the weights alone, and of the whole engine."""
    files = sorted(path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    ceilings = {"read": statistics.median(read_rate(files, threads) for _ in range(3))}
    if gpu is not None:
        ceilings["copy"] = gpu.copy_rate()
    checkpoint = Checkpoint(path)
    peaks = Peaks(gpu)
    weights, engines = [], []
    resident = 0
    spent: dict[str, list[float]] = {}
    for _ in range(repeat):
        before = _core.cuda_loading_times()
        with peaks.watched():
            seconds, model = timed(
                lambda: loading.load(
                    checkpoint,
                    recipe=checkpoint.recipe(recipe),
                    devices=resolve_devices(device, None),
                    split=[],
                    threads=threads,
                    progress=False,
                )
            )
        weights.append(seconds)
        for name, total in _core.cuda_loading_times().items():
            spent.setdefault(name, []).append(total - before[name])
        resident = model.bytes
        del model
        seconds, engine = timed(
            lambda: Engine(
                path,
                device=device,
                quantize=recipe,
                threads=threads,
                max_sessions=1,
                progress=False,
            )
        )
        engines.append(seconds)
        engine.close()
    rate = size / statistics.median(weights)
    return {
        "file_bytes": size,
        "resident_bytes": resident,
        "weights_seconds": weights,
        "engine_seconds": engines,
        "thread_seconds": {name: statistics.median(each) for name, each in spent.items()},
        "threads": threads,
        "rate": rate,
        "ceilings": ceilings,
        "share": rate / min(ceilings.values()),
        "peak_host_bytes": peaks.host,
        "peak_device_bytes": peaks.device,
    }


def rows(name: str, found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is printed of one measurement."""
    ceilings = found["ceilings"]
    yield name, f"{found['file_bytes'] / GIB:.2f} GiB in files"
    yield "read from the page cache", f"{ceilings['read'] / 1e9:.2f} GB/s"
    if "copy" in ceilings:
        yield "pinned memory to the GPU", f"{ceilings['copy'] / 1e9:.2f} GB/s"
    yield "weights loaded in", ", ".join(f"{s:.3f} s" for s in found["weights_seconds"])
    yield "Engine opened in", ", ".join(f"{s:.3f} s" for s in found["engine_seconds"])
    if "copy" in ceilings:
        spent = found["thread_seconds"]
        rest = found["threads"] * statistics.median(found["weights_seconds"]) - sum(spent.values())
        parts = [f"{name} {seconds:.2f}" for name, seconds in (*spent.items(), ("else", rest))]
        yield "seconds of all threads", ", ".join(parts)
    yield "rate (median)", f"{found['rate'] / 1e9:.2f} GB/s"
    yield "share of the slower ceiling", f"{100 * found['share']:.0f} %"
    yield "resident", f"{found['resident_bytes'] / GIB:.2f} GiB"
    yield "peak of the host, with pinned", f"{found['peak_host_bytes'] / GIB:.2f} GiB"
    if "copy" in ceilings:
        over = found["peak_device_bytes"] - found["resident_bytes"]
        yield "peak of the GPU's memory", f"resident + {over / GIB:.2f} GiB"


def main(argv: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=["tiny", *PRESETS], default="small")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="loads of each kind")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="also a bfloat16 checkpoint of N layers, as int4"
    )
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where files go; default: /tmp")
    parser.add_argument(
        "--bundle", type=Path, metavar="PATH", help="load it instead of writing one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures")
    args = parser.parse_args(argv)
    device = resolve_devices(args.device, None)[0]
    gpu = Gpu(int(device.partition(":")[2])) if device.startswith("cuda") else None
    report: dict[str, Any] = {
        "preset": args.preset,
        "device": device,
        "gpu": _core.cuda_device_info(int(device.partition(":")[2])) if gpu else None,
        "threads": args.threads,
    }
    common = (args.device, args.threads, args.repeat, gpu)
    with Engine(
        device=device
    ):  # loads the driver and makes the context, which nobody waits for twice
        pass
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        bundle = args.bundle or Path(folder) / "bundle"
        if args.bundle is None:
            source = Path(folder) / "source"
            source.mkdir()
            (source / "config.json").write_text(json.dumps(preset(args.preset)))
            seconds, _ = timed(
                lambda: quantize(
                    source, bundle, recipe="int4", threads=args.threads, load_format="dummy"
                )
            )
            print(f"wrote the bundle in {seconds:.1f} s", flush=True)
        report["bundle"] = measure(bundle, None, *common)
        if args.layers is not None:
            if args.bundle is None:
                shutil.rmtree(bundle)
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, preset(args.preset, args.layers))
            os.sync()  # so that nothing is written while it is read
            name = f"bfloat16, {args.layers} layers, as int4"
            report[name] = measure(checkpoint, "int4", *common)
    for name, found in report.items():
        if isinstance(found, dict) and "rate" in found:
            print()
            for key, value in rows(name, found):
                print(f"{key:32} {value}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\n{'peak of the process, with files':32} {peak / GIB:.2f} GiB")
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
