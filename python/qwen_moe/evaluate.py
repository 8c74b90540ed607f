"""`qwen-moe eval`: what quantizing costs, against the unquantized weights on a text."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qwen_moe import info
from qwen_moe.bundle import MANIFEST
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.engine import EMBEDDED, Engine
from qwen_moe.errors import InvalidArgument

Open = Callable[[str | None], Engine]  # with the recipe, or None for the weights as they are


@dataclass(frozen=True, slots=True)
class Loss:
    """How far one recipe is from the reference.

    Attributes:
        recipe: none, int8, int4 or int4-all.
        weight_bytes: Resident.
        perplexity: Of the text.
        kl: Mean divergence of the next token's distribution from the reference's, in nats.
        same_top: Share of tokens after which both find the same token likeliest.
    """

    recipe: str
    weight_bytes: int
    perplexity: float
    kl: float
    same_top: float


def evaluate(
    reference: Callable[[], Engine],
    opened: Open,
    ids: Sequence[int],
    recipes: Sequence[str],
    *,
    context: int,
) -> Iterator[Loss]:
    """Losses of recipes, the reference first as recipe "none".

    One engine is open at a time; the reference's log-probabilities lie in a temporary file of
    len(ids) * vocab_size * 4 bytes meanwhile.

    Args:
        reference: Opens the unquantized weights.
        opened: Opens the checkpoint with a recipe.
        ids: The text.
        recipes: Of none, int8, int4 and int4-all, in order. "none" is the checkpoint as it is, and
            left out when that is the reference itself.
        context: Tokens of a window. Every window begins anew.

    Raises:
        InvalidArgument: The text is too short to say anything.
    """
    if len(ids) < 2 or context < 2:
        raise InvalidArgument(f"{len(ids)} tokens in windows of {context} say nothing; give 2")
    with tempfile.TemporaryFile() as file:
        with reference() as engine:
            shape = (len(ids), engine.config.vocab_size)
            kept = np.memmap(file, np.float32, "w+", shape=shape)
            yield _measure(engine, "none", ids, context, kept, compare=False)
        for recipe in recipes:
            with opened(None if recipe == "none" else recipe) as engine:
                if engine.config.vocab_size != shape[1]:
                    raise InvalidArgument(
                        f"the reference has a vocabulary of {shape[1]}, {engine.path} one of "
                        f"{engine.config.vocab_size}; they must be the same model"
                    )
                yield _measure(engine, recipe, ids, context, kept, compare=True)


def _measure(
    engine: Engine,
    recipe: str,
    ids: Sequence[int],
    context: int,
    kept: np.memmap[tuple[int, int], np.dtype[np.float32]],
    *,
    compare: bool,
) -> Loss:
    """Walk through the text once; write the log-probabilities to `kept`, or compare with them."""
    surprise = divergence = 0.0
    same = predicted = 0
    with engine.session() as session:
        for index, token in enumerate(ids):
            if index % context == 0:
                session.reset()
            session.prefill([token])
            found = session.logits.log_softmax(-1)
            if (index + 1) % context and index + 1 < len(ids):
                surprise -= float(found[ids[index + 1]])
                predicted += 1
            if not compare:
                kept[index] = found.numpy()
            want = torch.from_numpy(np.array(kept[index]))
            divergence += float((want.exp() * (want - found)).sum())
            same += int(want.argmax() == found.argmax())
    return Loss(
        recipe,
        engine.memory["weights"],
        math.exp(surprise / predicted),
        divergence / len(ids),
        same / len(ids),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=EMBEDDED,
        metavar="PATH",
        help="checkpoint; default: the one in the package",
    )
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a text in UTF-8")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=info.RECIPES,
        help="default: all that quantize; of a bundle, and with --reference, PATH as it is",
    )
    parser.add_argument(
        "--group", type=int, metavar="N", help="input features per scale: 32 (CPU), 64 or 128"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="the unquantized checkpoint of the same model, where PATH is quantized already; "
        "without one a bundle has a perplexity only",
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text at most")
    parser.add_argument("--context", type=int, default=512, metavar="N", help="tokens of a window")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all CPUs")


def run(args: argparse.Namespace) -> None:
    """Print a table with a row for each recipe."""
    if args.tokens < 2 or args.context < 2:
        raise InvalidArgument("--tokens and --context must be at least 2")
    try:
        text = args.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{args.text}: {error}") from error
    unquantized = args.path if args.reference is None else args.reference
    packed = (args.path / MANIFEST).is_file()
    alone = packed and args.reference is None
    recipes = args.recipes
    if recipes is None:
        recipes = [] if alone else ["none"] if args.reference else list(info.RECIPES[1:])
    elif alone:
        raise InvalidArgument(
            f"--recipes {' '.join(recipes)}: {args.path} is packed already; leave --recipes out "
            "for its perplexity, or compare it with the checkpoint that it was made from by "
            "--reference PATH"
        )

    def opened(path: Path, recipe: str | None) -> Engine:
        return Engine(
            path,
            device=args.device,
            threads=args.threads,
            quantize=recipe,
            group=args.group if recipe is not None else None,
            max_sessions=1,
            max_context=args.context,
        )

    ids = Checkpoint(unquantized, "dummy").tokenizer().encode(text)[: args.tokens]
    losses = evaluate(
        lambda: opened(unquantized, None),
        lambda recipe: opened(args.path, recipe),
        ids,
        recipes,
        context=args.context,
    )
    print(f"{args.path}, {len(ids)} tokens of {args.text} in windows of {args.context}\n")
    print("| recipe | weights | perplexity | KL per token | same top-1 |")
    print("|---|---|---|---|---|")
    as_it_is = Checkpoint(args.path).recipe() if packed else "none"
    for number, loss in enumerate(losses):
        name = loss.recipe if number else "reference"
        if name == "none" or alone:
            name = as_it_is
        distance = "- | -" if alone else f"{loss.kl:.2g} | {100 * loss.same_top:.1f} %"
        print(
            f"| {name} | {info.size(loss.weight_bytes)} | {loss.perplexity:.3f} | {distance} |",
            flush=True,
        )
    if alone:
        print(
            "\nA bundle alone has nothing to be compared with: --reference PATH names the "
            "checkpoint that it was made from."
        )
