"""What the tests of bundles share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foreign
import qwen_moe
from qwen_moe import _core, quantize
from qwen_moe.bundle import MANIFEST
from qwen_moe.checkpoint import Checkpoint

TINY = foreign.TINY
WRITTEN = {MANIFEST, "packed-00001-of-00001.safetensors"}
RECIPES = ("int8", "int4", "int4-all")
IDS = list(range(3, 90))


def open_cpu(path: Path, **settings: Any) -> qwen_moe.Engine:
    defaults = {"device": "cpu", "max_sessions": 1, "max_context": 128, "kv_dtype": "float32"}
    return qwen_moe.Engine(path, **(defaults | settings))


def logits(path: Path, **settings: Any) -> torch.Tensor:
    """[2, vocab]: after prefill, and after a decode step."""
    with open_cpu(path, **settings) as engine, engine.session() as session:
        session.prefill(IDS)
        rows = [session.logits.clone()]
        session.prefill([7])
        return torch.stack([*rows, session.logits])


def written(out: Path, recipe: str = "int4", source: Path = TINY, **settings: Any) -> Path:
    quantize.quantize(source, out, recipe=recipe, **settings)
    return out


def edit(path: Path, change: Callable[[dict], Any]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def empty_model(checkpoint: Checkpoint, identity: str) -> _core.Model:
    return _core.Model(
        config=checkpoint.config,
        recipe="int4",
        dtype=checkpoint.dtype,
        checkpoint=identity,
        devices=["cpu"],
        split=[],
        threads=1,
    )


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def refused(path: Path, error: type[Exception], *words: str, **settings: Any) -> None:
    with pytest.raises(error) as caught, open_cpu(path, **settings):
        pass
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)
