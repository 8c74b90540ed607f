"""The arrows between the folders of csrc point one way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"

# What a folder may include, besides the standard library.
MAY_SEE = {
    "base": {"base"},
    "model": {"base", "model"},
    "state": {"base", "model", "state"},
    "engine": {"base", "model", "state", "engine"},
    "cpu": {"base", "model", "state", "engine", "cpu"},
    "cuda": {"base", "model", "state", "engine", "cuda"},
    "bindings": {"base", "model", "state", "engine", "bindings"},
}
ONLY_IN = {
    re.compile(r"pybind11/|Python\.h"): "bindings",
    re.compile(r"cuda|cublas|nv[A-Z]|cooperative_groups|mma\.h"): "cuda",
    re.compile(r"immintrin\.h|x86intrin\.h|arm_neon\.h"): "cpu",
}
INCLUDE = re.compile(r'^\s*#\s*include\s*(["<])([^">]+)[">]', re.MULTILINE)


def sources() -> dict[str, str]:
    endings = {".h", ".cpp", ".cu", ".cuh"}
    return {
        path.relative_to(CSRC).as_posix(): path.read_text()
        for path in sorted(CSRC.rglob("*"))
        if path.suffix in endings
    }


def wrong_arrows(files: Mapping[str, str]) -> list[str]:
    wrong = []
    for name, text in files.items():
        folder = name.split("/")[0]
        for kind, target in INCLUDE.findall(text):
            arrow = f"{name} -> {target}"
            if kind == "<":
                owners = {owner for pattern, owner in ONLY_IN.items() if pattern.match(target)}
                if owners - {folder}:
                    wrong.append(arrow)
            elif target not in files or target.split("/")[0] not in MAY_SEE[folder]:
                wrong.append(arrow)
    return wrong


def cycles(files: Mapping[str, str]) -> list[str]:
    """Headers that reach themselves."""
    direct = {
        name: {t for k, t in INCLUDE.findall(text) if k == '"'} for name, text in files.items()
    }
    found = []
    for name in files:
        reached, frontier = set(), set(direct[name])
        while frontier:
            reached |= frontier
            frontier = {t for f in frontier for t in direct.get(f, ())} - reached
        if name in reached:
            found.append(name)
    return found


def test_includes_point_one_way() -> None:
    files = sources()
    assert {name.split("/")[0] for name in files} == set(MAY_SEE)
    assert wrong_arrows(files) == []
    assert cycles(files) == []


def test_a_source_includes_its_own_header_first() -> None:
    files = sources()
    late = [
        name
        for name, text in files.items()
        if name.endswith((".cpp", ".cu"))
        and (own := re.sub(r"\.\w+$", ".h", name)) in files
        and next(target for _, target in INCLUDE.findall(text)) != own
    ]
    assert late == []


def test_wrong_arrows_are_seen() -> None:
    files = {
        "base/a.h": '#include "model/b.h"\n',
        "model/b.h": '#include "engine/e.h"\n#include <vector>\n',
        "engine/e.h": '#include "cpu/k.h"\n#  include <cuda_runtime.h>\n#include "model/b.h"\n',
        "cpu/k.h": '#include "cuda/k.h"\n#include "../base/a.h"\n#include <immintrin.h>\n',
        "cuda/k.h": '#include "cpu/k.h"\n#include "engine/e.h"\n#include <cuda_runtime.h>\n',
        "bindings/m.cpp": '#include "cpu/k.h"\n#include <pybind11/pybind11.h>\n',
    }
    assert wrong_arrows(files) == [
        "base/a.h -> model/b.h",
        "model/b.h -> engine/e.h",
        "engine/e.h -> cpu/k.h",
        "engine/e.h -> cuda_runtime.h",
        "cpu/k.h -> cuda/k.h",
        "cpu/k.h -> ../base/a.h",
        "cuda/k.h -> cpu/k.h",
        "bindings/m.cpp -> cpu/k.h",
    ]
    assert "model/b.h" in cycles(files)
