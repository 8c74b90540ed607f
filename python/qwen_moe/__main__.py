"""The command line: `qwen-moe generate | chat | quantize | bench | eval | info`."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_moe import bench, chat, evaluate, info, quantize
from qwen_moe.engine import EMBEDDED, Engine
from qwen_moe.errors import Error, InvalidArgument
from qwen_moe.sampling import SamplingParams, recommended
from qwen_moe.session import Session

DEFAULT_PROMPT = "Once upon a time"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 2 after an error and 130 after Ctrl-C."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen-moe", description="Run Qwen3.5 / Qwen3.6 mixture-of-experts models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt: text to stdout as it comes, figures to stderr.",
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue")
    generate.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the prompt from FILE"
    )
    generate.add_argument("--chat", action="store_true", help="ask it by the chat template")
    generate.add_argument(
        "--warmup", type=int, default=0, metavar="N", help="unmeasured, silent runs before"
    )
    generate.add_argument(
        "--num-iters", type=int, default=1, metavar="N", help="runs; the figures are medians"
    )
    generate.add_argument(
        "--stats", action="store_true", help="also print where memory went, and the counters"
    )
    add_engine_arguments(generate)
    add_sampling_arguments(generate, max_tokens=128)
    generate.set_defaults(run=run_generate)

    talk = commands.add_parser(
        "chat",
        help="a conversation",
        description=f"A conversation on one session. {chat.HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    talk.add_argument("--system", metavar="TEXT", help="a system message to open with")
    talk.add_argument("--no-think", action="store_true", help="ask the model not to think aloud")
    add_engine_arguments(talk)
    add_sampling_arguments(talk, max_tokens=512)
    talk.set_defaults(run=_run_chat)

    pack = commands.add_parser(
        "quantize",
        help="pack a checkpoint once, to load it faster",
        description="Write the checkpoint SRC, packed, to the directory OUT. It opens like SRC, "
        "needs no packing and gives the same replies as SRC with --quantize.",
    )
    quantize.add_arguments(pack)
    pack.set_defaults(run=quantize.run)

    measure = commands.add_parser(
        "bench",
        help="measure prefill and decode",
        description="Measure prefill and decode against the memory's read bandwidth.",
    )
    bench.add_arguments(measure)
    measure.set_defaults(run=bench.run)

    loss = commands.add_parser(
        "eval",
        help="what quantizing costs",
        description="Perplexity, divergence and agreement of every recipe on a text, against the "
        "unquantized weights.",
    )
    evaluate.add_arguments(loss)
    loss.set_defaults(run=evaluate.run)

    facts = commands.add_parser(
        "info",
        help="sizes of a checkpoint",
        description="Sizes of a checkpoint; what fits here.",
    )
    info.add_arguments(facts)
    facts.set_defaults(run=info.run)
    return parser


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say which checkpoint to open, and how."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        type=Path,
        metavar="PATH",
        help="checkpoint directory or GGUF file; default: the one in the package",
    )
    group.add_argument("--quantize", choices=("none", "int8", "int4", "int4-all"), default="none")
    group.add_argument(
        "--group", type=int, metavar="N", help="input features per scale: 32 (CPU), 64 or 128"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")
    group.add_argument("--max-context", type=int, metavar="N", help="tokens of a session")


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Options that say how tokens are drawn."""
    group = parser.add_argument_group(
        "sampling", "What is left out is as the checkpoint's generation_config.json recommends."
    )
    group.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N")
    group.add_argument("--temperature", type=float, metavar="T", help="0: greedy")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="X")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X")
    group.add_argument("--seed", type=int, metavar="N", help="default: a fresh one")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="may be repeated"
    )
    group.add_argument("--ignore-eos", action="store_true")


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options ask for."""
    return Engine(
        args.model,
        device=args.device,
        quantize=None if args.quantize == "none" else args.quantize,
        group=args.group,
        threads=args.threads,
        max_context=args.max_context,
    )


def sampling_of(args: argparse.Namespace) -> SamplingParams:
    """The sampling settings that the options ask for, over what the checkpoint recommends."""
    settings = recommended(args.model or EMBEDDED)
    if args.temperature == 0:  # greedy: the recommended cuts mean nothing then
        settings = {key: settings[key] for key in settings if key == "repetition_penalty"}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    return SamplingParams(
        **settings,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=args.seed,
        max_tokens=args.max_tokens,
        stop=args.stop,
        ignore_eos=args.ignore_eos,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """Figures of one continuation."""

    prompt_tokens: int
    reply_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finish_reason: str


def run_generate(args: argparse.Namespace) -> None:
    """`qwen-moe generate`."""
    prompt = _prompt(args)
    params = sampling_of(args)
    if args.num_iters < 1 or args.warmup < 0:
        raise InvalidArgument("--num-iters must be at least 1 and --warmup at least 0")
    began = time.perf_counter()
    with open_engine(args) as engine, engine.session() as session:
        load_seconds = time.perf_counter() - began
        if args.chat:
            messages = [{"role": "user", "content": prompt}]
            prompt = engine.tokenizer.apply_chat_template(messages)
        for _ in range(args.warmup):
            _continue(session, prompt, params, silent=True)
        runs = [_continue(session, prompt, params) for _ in range(args.num_iters)]
        print(_figures(load_seconds, runs), file=sys.stderr)
        if args.stats:
            for name, value in engine.memory.items():
                print(f"  {name}: {value / 2**20:.1f} MiB", file=sys.stderr)
            for name, value in engine.stats.items():
                print(f"  {name}: {value}", file=sys.stderr)


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None and args.prompt_file is not None:
        raise InvalidArgument("give PROMPT or --prompt-file, not both")
    if args.prompt_file is not None:
        try:
            return str(args.prompt_file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"{args.prompt_file}: {error}") from error
    if args.prompt is not None:
        return str(args.prompt)
    if args.model is not None:
        raise InvalidArgument("give a PROMPT or --prompt-file")
    return DEFAULT_PROMPT


def _continue(
    session: Session, prompt: str, params: SamplingParams, *, silent: bool = False
) -> _Run:
    session.reset()
    ids = session.engine.prompt_ids(prompt)
    count = 0
    began = first = time.perf_counter()
    for step in session.generate(ids, params):
        if count == 0:
            first = time.perf_counter()
        count += 1
        if not silent:
            print(step.text, end="", flush=True)
    ended = time.perf_counter()
    if not silent:
        print(flush=True)
    return _Run(len(ids), count, first - began, ended - first, session.finish_reason)


def _figures(load_seconds: float, runs: Sequence[_Run]) -> str:
    """One line; rates are medians over the runs."""
    last = runs[-1]
    prefill = statistics.median(run.prompt_tokens / run.prefill_seconds for run in runs)
    decoded = [(run.reply_tokens - 1) / run.decode_seconds for run in runs if run.reply_tokens > 1]
    decode = f"{statistics.median(decoded):.1f} tok/s" if decoded else "one draw"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        f"load {load_seconds:.2f} s | prefill {last.prompt_tokens} tokens, {prefill:.1f} tok/s | "
        f"decode {last.reply_tokens} tokens, {decode} | ended by {last.finish_reason} | "
        f"peak memory {peak:.0f} MiB"
    )


def _run_chat(args: argparse.Namespace) -> None:
    params = sampling_of(args)
    with open_engine(args) as engine:
        options = {"enable_thinking": False} if args.no_think else {}
        chat.Chat(engine, params, system=args.system, template_options=options).run()


if __name__ == "__main__":
    sys.exit(main())
