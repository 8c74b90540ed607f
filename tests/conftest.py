"""Shared by every test: no network, and one engine on the embedded checkpoint per recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Reference models are small, and threads of torch and of the engine would only wait for each other.
torch.set_num_threads(1)

# Reproducible by default; `pytest --hypothesis-profile search` looks for new examples.
settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "search", parent=settings.get_profile("default"), derandomize=False, max_examples=1000
)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say why they did not run."""
    from qwen_moe import _core

    if _core.cuda_available():
        return
    reason = "no CUDA: this build is without it, or the machine has no usable GPU"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


RECIPES = [None, "int8", "int4", "int4-all"]


@pytest.fixture(scope="session", params=RECIPES, ids=str)
def recipe_engine(request: pytest.FixtureRequest) -> Iterator[object]:
    """The embedded checkpoint under each recipe."""
    import qwen_moe

    with qwen_moe.Engine(
        quantize=request.param, device="cpu", max_sessions=8, max_context=512
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the embedded checkpoint."""
    from bundles import written

    return written(tmp_path_factory.mktemp("bundle") / "int4")


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "int4"))
