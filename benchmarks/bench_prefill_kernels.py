#!/usr/bin/env python3
"""Times every Triton prefill kernel at 35B-A3B shapes and checks it against torch, on one GPU.

    python3 benchmarks/bench_prefill_kernels.py [--rows 128,512,8192] [--only X] [--search]

Needs torch and Triton, not the built core, and no network. Every kernel runs as the spec table has
it. With --search it runs with a few more configurations too, all printed, so that the best can be
frozen there; a kernel that fails is then reported and the others go on, as every group of kernels
has a process of its own. With TRITON_INTERPRET=1 and --smoke the same code runs once on the CPU
with small shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# Importing qwen_moe itself would want the built core.
sys.modules["qwen_moe"] = types.ModuleType("qwen_moe")
sys.modules["qwen_moe"].__path__ = [str(ROOT / "python" / "qwen_moe")]
sys.path.insert(0, str(ROOT / "tests"))

from prefill.experts import Experts  # noqa: E402
from prefill.inputs import SMOKE, Case, Shape  # noqa: E402
from prefill.mixers import Mixers  # noqa: E402
from prefill.projections import Projections  # noqa: E402


class Bench(Projections, Mixers, Experts):
    """Every kernel, in the order of a layer."""

    def groups(self, t: int) -> list[tuple[str, Callable[[], Case | list[Case]]]]:
        s, p = self.s, self.projection
        attention_in = 2 * (s.heads + s.kv_heads) * s.head_dim
        d, a, every = s.delta_layers, s.attention_layers, s.layers
        h, gates = s.hidden, 2 * s.value_heads
        return [
            ("rms_norm", lambda: self.rms_norm(t)),
            ("in_proj", lambda: p("in_proj qkv, z int4", t, s.channels + s.value_dim, h, 4, d)),
            ("in_proj", lambda: p("in_proj b, a bf16", t, gates, h, 16, d, narrow=True)),
            ("conv", lambda: self.convolution(t)),
            ("conv", lambda: self.conv_window(t)),
            ("delta", lambda: self.delta(t)),
            ("out_proj", lambda: p("out_proj int8", t, h, s.value_dim, 8, every, residual=True)),
            ("in_proj", lambda: p("q, k, v int4", t, attention_in, h, 4, a)),
            ("attention", lambda: self.attention(t)),
            ("router", lambda: p("router, gate bf16", t, s.experts + 1, h, 16, every, narrow=True)),
            ("shared", lambda: self.shared_gate_up(t)),
            (
                "shared",
                lambda: p("shared down int8", t, h, s.shared, 8, every, residual=True, gated=True),
            ),
            ("experts", lambda: self.experts(t)),
        ]


WRONG = 2e-2  # relative error that rounding does not explain


@dataclass
class Result:
    name: str
    rows: int
    count: int = 0
    config: str = ""
    us: float = 0
    tflops: float = 0
    gbs: float = 0
    error: float = 0
    tried: dict[str, float | str] = field(default_factory=dict)
    failure: str = ""


def microseconds(run: Callable[[], None], device: str) -> float:
    """Median of graph replays: launching from Python costs more than most of these kernels."""
    run()
    if device == "cpu":
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6
    torch.cuda.synchronize()
    graph, launches = torch.cuda.CUDAGraph(), 5
    with torch.cuda.graph(graph):
        for _ in range(launches):
            run()
    graph.replay()
    times = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def measure(case: Case, t: int, device: str, *, search: bool) -> Result:
    result = Result(case.name, t, case.count)
    for variant in case.variants if search else case.variants[:1]:
        try:
            us = microseconds(variant.run, device)
        except Exception as error:
            result.tried[variant.label] = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        case.reset()
        variant.run()
        error = case.check()
        result.error = max(result.error, error)
        result.tried[variant.label] = round(us, 1) if error < WRONG else f"{us:.1f}, WRONG {error}"
        if error < WRONG and (not result.us or us < result.us):
            result.us, result.config = us, variant.label
    if not result.us:
        result.failure = "no configuration ran and was right"
        return result
    result.tflops = case.flops / result.us / 1e6
    result.gbs = case.bytes / result.us / 1e3
    return result


def show(result: Result) -> None:
    if result.failure:
        print(f"{result.name:30} {result.rows:6}  FAILED: {result.failure}", flush=True)
    else:
        rate = f"{result.tflops:8.1f} TF/s" if result.tflops else f"{'':13}"
        bytes_rate = f"{result.gbs:8.0f} GB/s" if result.gbs else f"{'':13}"
        print(
            f"{result.name:30} {result.rows:6} {result.us:10.1f} us {rate} {bytes_rate}"
            f"  error {result.error:.1e}  {result.config}",
            flush=True,
        )
    if len(result.tried) > 1 or result.failure:
        for config, us in result.tried.items():
            print(f"      {config:46} {us}", flush=True)


def ceilings() -> dict[str, float]:
    """Bytes a second of a plain copy and TFLOP/s of the library's plain product."""
    a = torch.randn(8192, 8192, device="cuda").to(torch.bfloat16)
    b = torch.empty_like(a)
    c = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(c)
    tflops = 2 * 8192**3 / microseconds(lambda: torch.mm(a, a, out=b), "cuda") / 1e6
    gbs = 2 * c.numel() / microseconds(lambda: to.copy_(c), "cuda") / 1e3
    return {"library bf16 TFLOP/s": round(tflops, 1), "copy GB/s": round(gbs)}


def summary(results: list[Result], rows: list[int]) -> dict[str, float]:
    """Of the whole model, by adding kernels up."""
    speed = {}
    for t in rows:
        here = [r for r in results if r.rows == t and r.count and not r.failure]
        total = sum(r.us * r.count for r in here)
        if not total:
            continue
        print(f"\n{t} rows: kernels of the model add up to {total / 1e3:.1f} ms")
        for r in sorted(here, key=lambda r: -r.us * r.count):
            share = r.us * r.count
            print(f"  {r.name:30} x{r.count:<3} {share / 1e3:8.2f} ms {100 * share / total:5.1f} %")
        speed[str(t)] = round(t / total * 1e6)
        print(f"  => {speed[str(t)]} tokens/s without launch gaps, embedding and head")
        missing = [r.name for r in results if r.rows == t and r.failure]
        if missing:
            print(f"  not counted, failed: {', '.join(missing)}")
    return speed


def run_group(
    bench: Bench, only: str, rows: list[int], *, search: bool, compile_only: bool
) -> list[Result]:
    """The kernels of the groups of that name, here."""
    results: list[Result] = []
    for t in rows:
        torch.manual_seed(t)
        for group, make in bench.groups(t):
            if only not in group:
                continue
            try:
                cases = make()
            except Exception:
                traceback.print_exc()
                results.append(Result(group, t, failure="its inputs could not be made"))
                continue
            for case in cases if isinstance(cases, list) else [cases]:
                if compile_only:
                    for variant in case.variants if search else case.variants[:1]:
                        with contextlib.suppress(Exception):
                            variant.run()
                    continue
                try:
                    result = measure(case, t, bench.device, search=search)
                except Exception as error:
                    traceback.print_exc()
                    result = Result(case.name, t, failure=f"{type(error).__name__}: {error}"[:200])
                results.append(result)
                show(result)
    return results


CHILD = [sys.executable, "-W", "ignore", __file__, "--child"]


def compile_all(groups: list[str], rows: str, flags: list[str]) -> None:
    """Fills the compiler's cache, a process for each group, so that times are taken without it."""
    began = time.monotonic()
    running = [
        subprocess.Popen(
            [*CHILD, *flags, "--compile", f"--only={group}", f"--rows={rows}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for group in groups
    ]
    for process in running:
        try:
            process.wait(max(1.0, 180 - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def run_isolated(groups: list[str], rows: str, flags: list[str]) -> list[Result]:
    """Each group in a process of its own, as a bad access ends all work of a process on the GPU."""
    results: list[Result] = []
    for group in groups:
        with tempfile.TemporaryDirectory() as made:
            to = Path(made) / "results.json"
            try:
                subprocess.run(
                    [*CHILD, *flags, f"--only={group}", f"--rows={rows}", f"--json={to}"],
                    timeout=240,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                print(f"{group}: not done after 240 s", flush=True)
            if to.exists():
                results += [Result(**entry) for entry in json.loads(to.read_text())["results"]]
            else:
                results.append(Result(group, 0, failure="its process did not finish"))
                show(results[-1])
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="128,512,8192")
    parser.add_argument("--only", default="", help="groups whose name contains this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small shapes on the CPU")
    parser.add_argument(
        "--search", action="store_true", help="more configurations than the table's"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cpu" if options.smoke else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use; --smoke with TRITON_INTERPRET=1 runs on the CPU")
        return 77
    import triton

    rows = [65] if options.smoke else [int(x) for x in options.rows.split(",")]
    bench = Bench(SMOKE if options.smoke else Shape(), device, options.smoke)
    report: dict[str, Any] = {"triton": triton.__version__, "torch": torch.__version__}
    if device == "cuda" and not options.child:
        report |= {"device": torch.cuda.get_device_name(), **ceilings()}
        torch.cuda.empty_cache()
        print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    groups = [name for name in dict(bench.groups(64)) if options.only in name]
    flags = ["--search"] * options.search + ["--smoke"] * options.smoke
    if device == "cuda" and not options.child:
        compile_all(groups, options.rows, flags)
    if options.child or not options.search:
        search, compile_only = options.search, options.compile
        results = run_group(bench, options.only, rows, search=search, compile_only=compile_only)
    else:
        results = run_isolated(groups, options.rows, flags)
    if not options.child:
        report["tokens per second"] = summary(results, rows)
    report["results"] = [asdict(result) for result in results]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [r.name for r in results if r.failure or not r.error < WRONG]
    if wrong and not options.child:
        print(f"\nfailed or wrong: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
