"""`qwen-moe bench`: prefill and decode, against the read bandwidth measured in the same run.

What differs on a GPU is in `bench_gpu`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_moe import _core, bench_gpu
from qwen_moe.engine import Engine
from qwen_moe.errors import DeviceError, InvalidArgument
from qwen_moe.placement import resolve_devices
from qwen_moe.sampling import SamplingParams

PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "full_attention_interval": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 8,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_theta": 10000000, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "35b-a3b": {  # the dimensions of Qwen3.6-35B-A3B
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_theta": 10000000, "partial_rotary_factor": 0.25},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
}


READ_SECONDS = 0.1  # of every plain read


@dataclass(frozen=True, slots=True)
class Measurement:
    """Medians of one batch size.

    Attributes:
        batch: Sessions together.
        prefill_tokens_per_second: Over all of them.
        decode_tokens_per_second: Over all of them.
        of_read: For every turn, decode tokens per second over the bytes per second of a plain read
            taken just before and just after. Times the bytes a token reads, a share of the ceiling.
        tokens_sha256: Of the drawn tokens, or "runs differ".
    """

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    of_read: list[float]
    tokens_sha256: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint")
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="a config.json; weights are random"
    )
    source.add_argument(
        "--preset", choices=sorted(PRESETS), help="a built-in config; weights are random"
    )
    parser.add_argument("--quantize", choices=("none", "int8", "int4", "int4-all"), default="int4")
    parser.add_argument(
        "--group", type=int, metavar="N", help="input features per scale: 32 (CPU), 64 or 128"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")
    parser.add_argument(
        "--batch", type=_batches, metavar="N,N,...", help="default: 1,2,4,8; to 64 on a GPU"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--decode-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    parser.add_argument(
        "--long-context",
        type=int,
        metavar="N",
        help="on a GPU: also decode one session behind N tokens",
    )
    parser.add_argument(
        "--prompts",
        type=_batches,
        metavar="N,N,...",
        help="on a GPU: also time prompts of N tokens, and replies beside the longest",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")


def run(args: argparse.Namespace) -> None:
    """Measure, write the JSON file, and print a table last."""
    if args.prompt_tokens < 1 or args.decode_tokens < 2 or args.repeat < 1:
        raise InvalidArgument(
            "--prompt-tokens and --repeat must be at least 1, --decode-tokens at least 2"
        )
    threads = args.threads or len(os.sched_getaffinity(0))
    gpu = resolve_devices(args.device, None)[0] != "cpu"
    if args.long_context is not None and (not gpu or args.long_context < 1):
        raise InvalidArgument("--long-context takes a positive number, and a GPU")
    if args.prompts is not None and not gpu:
        raise InvalidArgument("--prompts takes a GPU")
    with tempfile.TemporaryDirectory() as scratch:
        path, dummy = _source(args, Path(scratch))
        settings: dict[str, Any] = {
            "path": path,
            "device": args.device,
            "quantize": None if args.quantize == "none" else args.quantize,
            "group": args.group,
            "threads": threads,
            "load_format": "dummy" if dummy else "auto",
        }
        if gpu:
            if max(args.batch or [1]) > bench_gpu.MAX_ROWS:
                raise InvalidArgument(f"--batch takes at most {bench_gpu.MAX_ROWS} on a GPU")
            plan = bench_gpu.Plan(
                batches=args.batch or [1, 2, 4, 8, 16, 32, 64],
                prompt_tokens=args.prompt_tokens,
                decode_tokens=args.decode_tokens,
                repeat=args.repeat,
                long_context=args.long_context or 0,
                prompts=args.prompts or [],
            )
            with Engine(**settings, max_sessions=plan.sessions, max_context=plan.context) as engine:
                figures = bench_gpu.measure(
                    engine, plan, decode_bytes(engine), lambda **more: Engine(**settings, **more)
                )
                report = _head(args, engine, threads) | figures
            text = bench_gpu.table(report)
        else:
            batches = args.batch or [1, 2, 4, 8]
            with Engine(
                **settings,
                max_sessions=max(batches),
                max_context=args.prompt_tokens + args.decode_tokens,
            ) as engine:
                reads, measured = measure(
                    engine, batches, args.prompt_tokens, args.decode_tokens, args.repeat, threads
                )
                report = _head(args, engine, threads) | _figures(engine, reads, measured)
            text = table(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    print(text)
    if gpu and not report["without_graph"]["same_tokens"]:
        raise DeviceError(
            "with graphs and without, the same prompt got other tokens: something that a kernel "
            "reads is not what was written for it; the figures above are of a wrong result"
        )


def measure(
    engine: Engine,
    batches: Sequence[int],
    prompt_tokens: int,
    decode_tokens: int,
    repeat: int,
    threads: int,
) -> tuple[list[float], list[Measurement]]:
    """Run every batch size `repeat` times in turn, after an unmeasured round.

    Memory bandwidth drifts on a shared machine, so batch sizes alternate, and every decode run is
    set against plain reads right before and after it.

    Returns:
        The plain reads in bytes per second, and the medians of every batch size.
    """
    runs: list[list[_Run]] = [[] for _ in batches]
    reads: list[float] = []
    for turn in range(repeat + 1):
        for rows, done in zip(batches, runs, strict=True):
            run, read = _run(engine, rows, prompt_tokens, decode_tokens, threads)
            if turn == 0:
                done[:] = [run]  # kept for its tokens only
            else:
                done.append(run)
                reads += read
    measured = []
    for rows, done in zip(batches, runs, strict=True):
        hashes = {run.tokens_sha256 for run in done}
        timed = done[1:]
        measured.append(
            Measurement(
                batch=rows,
                prefill_tokens_per_second=statistics.median(run.prefill for run in timed),
                decode_tokens_per_second=statistics.median(run.decode for run in timed),
                of_read=[run.decode / run.read for run in timed],
                tokens_sha256=hashes.pop() if len(hashes) == 1 else "runs differ",
            )
        )
    return reads, measured


@dataclass(frozen=True, slots=True)
class _Run:
    prefill: float  # tokens per second
    decode: float
    read: float  # bytes per second
    tokens_sha256: str


def _run(
    engine: Engine, batch: int, prompt_tokens: int, decode_tokens: int, threads: int
) -> tuple[_Run, list[float]]:
    """One timed run of `batch` sessions, between two plain reads.

    The first token of a reply comes from the prefill, so the rate of decode counts the others.
    """
    core = engine.core
    vocabulary = engine.config.vocab_size
    sampling = SamplingParams(seed=0).to_core()
    sessions: list[int] = []
    try:
        for row in range(batch):
            sessions.append(core.open())
            prompt = random.Random(row).choices(range(vocabulary), k=prompt_tokens)
            core.submit(sessions[-1], prompt, sampling=None, max_tokens=0)
        began = time.perf_counter()
        core.run(sessions)
        filled = time.perf_counter()
        for session in sessions:
            core.submit(session, [], sampling=sampling, max_tokens=decode_tokens, ignore_eos=True)
        read = [_core.read_bandwidth(threads, seconds=READ_SECONDS)]
        started = time.perf_counter()
        core.run(sessions)
        ended = time.perf_counter()
        read.append(_core.read_bandwidth(threads, seconds=READ_SECONDS))
        tokens = _hash([core.poll(session).token_ids for session in sessions])
    finally:
        for session in sessions:
            core.close(session)
    prefill = batch * prompt_tokens / (filled - began)
    decode = batch * (decode_tokens - 1) / (ended - started)
    return _Run(prefill, decode, statistics.mean(read), tokens), read


def decode_bytes(engine: Engine) -> int:
    """Bytes of weights that one token reads: of the experts only those that it is routed to."""
    config = engine.config
    own_head = any(slot.fqn == "lm_head.weight" for slot in engine.slots)
    total = 0
    for slot in engine.slots:
        if ".experts." in slot.fqn:
            total += slot.bytes * config.num_experts_per_tok // config.num_experts
        elif slot.fqn == "embed_tokens.weight" and own_head:
            total += slot.bytes // config.vocab_size
        else:
            total += slot.bytes
    return total


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    machine, lines = report["machine"], []
    lines.append(
        f"{machine['cpu']} | {machine['isa']} | {machine['threads']} of {machine['cores']} CPUs | "
        f"{report['device']}"
    )
    lines.append(
        f"{report['model']} | {bench_gpu.recipe_of(report)} | prompt {report['prompt_tokens']} | "
        f"decode {report['decode_tokens']} | median of {report['repeat']}"
    )
    lines.append(
        f"plain read {report['read_bandwidth'] / 1e9:.1f} GB/s | a token reads "
        f"{report['weight_bytes_per_token'] / 1e6:.1f} MB of weights"
    )
    rows = report["results"]
    first = rows[0]["decode_tokens_per_second"]
    lines.append(f"{'batch':>5} {'prefill tok/s':>14} {'decode tok/s':>13} {'of first':>9}  tokens")
    lines += [
        f"{row['batch']:>5} {row['prefill_tokens_per_second']:>14.1f} "
        f"{row['decode_tokens_per_second']:>13.1f} "
        f"{row['decode_tokens_per_second'] / first:>8.2f}x  {row['tokens_sha256'][:16]}"
        for row in rows
    ]
    if report["decode_bandwidth"] is not None:
        lines.append(
            f"decode at batch 1 reads weights at {report['decode_bandwidth'] / 1e9:.1f} GB/s, "
            f"{report['share_of_read_bandwidth']:.0%} of the plain read beside it"
        )
    return "\n".join(lines)


def _head(args: argparse.Namespace, engine: Engine, threads: int) -> dict[str, Any]:
    """What was run, and where."""
    return {
        "machine": {
            "cpu": cpu_model(),
            "isa": _core.isa(),
            "cores": os.cpu_count(),
            "threads": threads,
        },
        "version": _core.__version__,
        "model": str(args.config or args.model or args.preset or "small"),
        "config_hash": engine.config.hash,
        "device": ", ".join(engine.devices),
        "quantize": args.quantize,
        "group": args.group,
        "prompt_tokens": args.prompt_tokens,
        "decode_tokens": args.decode_tokens,
        "repeat": args.repeat,
    }


def _figures(
    engine: Engine, reads: Sequence[float], measured: Sequence[Measurement]
) -> dict[str, Any]:
    """What came out, on CPUs."""
    each = decode_bytes(engine)
    alone = next((m for m in measured if m.batch == 1), None)
    return {
        "read_bandwidth": statistics.median(reads),
        "weight_bytes_per_token": each,
        "decode_bandwidth": alone and alone.decode_tokens_per_second * each,
        "share_of_read_bandwidth": alone and statistics.median(alone.of_read) * each,
        "memory": engine.memory,
        "results": [asdict(measurement) for measurement in measured],
    }


def _source(args: argparse.Namespace, scratch: Path) -> tuple[Path, bool]:
    """(directory to open, whether its weights are to be random)."""
    if args.model is not None:
        return args.model, False
    if args.config is not None:
        try:
            shutil.copyfile(args.config, scratch / "config.json")
        except OSError as error:
            raise InvalidArgument(f"{args.config}: {error}") from error
    else:
        (scratch / "config.json").write_text(json.dumps(PRESETS[args.preset or "small"]))
    return scratch, True


def _batches(text: str) -> list[int]:
    batches = [int(part) for part in text.split(",")]
    if min(batches) < 1:
        raise ValueError
    return batches


def _hash(rows: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(row) for row in rows]).encode()).hexdigest()


def cpu_model() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
