"""Logits on a GPU, close to those of the CPU and of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import oracle
import qwen_moe
from gpu_rig import (
    DEVICE,
    MEDIAN_KL,
    RECIPES,
    STEP,
    assert_close,
    bits,
    distances,
    ids_of,
    open_engine,
    walk,
)
from qwen_moe import _core
from qwen_moe.prefill_kernels import prefill_images

pytestmark = pytest.mark.gpu


def fed(engine: qwen_moe.Engine, ids: list[int], prompt: int) -> torch.Tensor:
    """Logits after the first `prompt` tokens, and after every one that follows."""
    with engine.session() as session:
        session.prefill(ids[:prompt])
        rows = [session.logits]
        for token in ids[prompt:]:
            session.prefill([token])
            rows.append(session.logits)
    return torch.stack(rows).double()


def greedy_ids(engine: qwen_moe.Engine, ids: list[int], steps: int) -> list[int]:
    with engine.session() as session:
        session.prefill(ids)
        return ids + [session.decode(STEP).token_id for _ in range(steps)]


PATHS = pytest.mark.parametrize("kernels", [True, False], ids=["prompts", "steps"])


@PATHS
@pytest.mark.parametrize("quantize", RECIPES, ids=str)
def test_logits_are_those_of_the_cpu(quantize: str | None, kernels: bool) -> None:
    with open_engine(device="cpu", quantize=quantize) as cpu:
        ids = greedy_ids(cpu, ids_of(3, 40), 32)
        want = fed(cpu, ids, 40)
    with open_engine(quantize=quantize, prefill_kernels=kernels) as gpu:
        assert_close(fed(gpu, ids, 40), want)


@PATHS
def test_logits_are_those_of_transformers(kernels: bool) -> None:
    path = Path(qwen_moe.__file__).parent / "models" / "tiny"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = oracle.reference(model, ids_of(3, 40), steps=32)
    with open_engine(quantize=None, prefill_kernels=kernels) as gpu:
        got = fed(gpu, ids.prompt + ids.continuation, 40)
    assert_close(got, torch.from_numpy(ids.logits[39:]))


def test_a_prompt_through_steps_gives_the_bits_of_decoding_it() -> None:
    with (
        open_engine(prefill_kernels=False) as engine,
        engine.session() as drawn,
        engine.session() as given,
    ):
        drawn.prefill(ids_of(0, 30))
        walked = walk(drawn, 40)
        given.prefill(drawn.tokens[:-1])
        assert bits(given) == walked[-1][1]


@dataclass(frozen=True)
class Shape:
    """Heads and widths of a published model; few layers, few experts."""

    hidden_size: int
    heads: tuple[int, int]  # attention, key-value
    linear: tuple[int, int]  # key, value
    experts: tuple[int, int]  # all, for each token
    intermediate: int

    def config(self) -> dict:
        return {
            "vocab_size": 640,
            "hidden_size": self.hidden_size,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "linear_num_key_heads": self.linear[0],
            "linear_num_value_heads": self.linear[1],
            "num_experts": self.experts[0],
            "num_experts_per_tok": self.experts[1],
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
        }


SHAPES = {
    "35B": Shape(2048, (16, 2), (16, 32), (10, 8), 512),
    "122B": Shape(3072, (32, 2), (16, 64), (9, 8), 1024),
    "397B": Shape(4096, (32, 2), (16, 64), (11, 10), 1024),
    "narrow, many experts": Shape(512, (4, 2), (4, 8), (64, 8), 128),
    "narrow, every expert": Shape(512, (8, 1), (2, 8), (8, 8), 256),
    "as wide as it is long": Shape(1024, (8, 4), (8, 8), (16, 1), 1024),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("shape", SHAPES)
def test_random_models_give_the_logits_of_the_cpu(shape: str) -> None:
    wide = SHAPES[shape].hidden_size > 1024  # those take a while to pack
    config = oracle.text_config(**SHAPES[shape].config())
    reference = oracle.random_model(config, seed=len(shape))
    prompts = [oracle.prompt(72, seed=seed, vocab=config.vocab_size) for seed in range(3, 7)]
    for recipe in ("none", "int4") if wide else ("none", "int8", "int4", "int4-all"):
        rows = []
        for device in ("cpu", DEVICE):
            threads = len(os.sched_getaffinity(0))
            model = oracle.core_model(reference, recipe=recipe, devices=(device,), threads=threads)
            rows.append(torch.cat([core_fed(model, ids, 40) for ids in prompts]))
            if device != "cpu":
                images = prefill_images([device])
                rows.append(torch.cat([core_fed(model, ids, 40, images) for ids in prompts]))
            del model
        for path, got in zip(("steps", "prompts"), rows[1:], strict=True):
            errors, divergences = distances(got, rows[0])
            report = f"{recipe}, {path}: relative L2 {errors.tolist()}, KL {divergences.tolist()}"
            # Weights without structure make routing a matter of rounding: where two experts are
            # level, one device takes this and the other that, and through the state all tokens
            # that follow get other logits. A tenth of the positions of four prompts come before.
            error, divergence = errors.quantile(0.1), divergences.quantile(0.1)
            # Prompts round to bf16, weights too once they are scaled, and more experts change.
            assert error <= 3e-2, report
            if path == "steps":
                assert divergence <= MEDIAN_KL, report


def core_fed(
    model: _core.Model, ids: list[int], prompt: int, images: Sequence[_core.KernelImage] = ()
) -> torch.Tensor:
    engine = oracle.core_engine(
        model, max_sessions=1, max_context=128, kv_dtype="bfloat16", prefill_kernels=images
    )
    session, rows = engine.open(), []
    for piece in [ids[:prompt], *([token] for token in ids[prompt:])]:
        engine.submit(session, piece, sampling=None, max_tokens=0)
        engine.run([session])
        assert engine.poll(session).error == ""
        row = oracle.core_logits(engine, session, model.config.vocab_size)
        rows.append(np.frombuffer(row, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).double()
