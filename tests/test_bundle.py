"""Bundles: a checkpoint packed once. Same bits as packing while loading; every defect is named."""

from __future__ import annotations

import json
import os
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import foreign
import qwen_moe
from bundles import (
    IDS,
    RECIPES,
    TINY,
    WRITTEN,
    edit,
    empty_model,
    logits,
    names,
    open_cpu,
    refused,
    written,
)
from qwen_moe import _core, bundle, bundle_writer, loading, quantize
from qwen_moe.bundle import MANIFEST
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.plan import plan

# --- What it holds --------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_bundle_gives_the_bits_of_packing_while_loading(tmp_path: Path, recipe: str) -> None:
    out = written(tmp_path / "out", recipe)
    want = logits(TINY, quantize=recipe)
    assert names(TINY) == sorted({*names(out), "README.md", "model.safetensors"} - WRITTEN)
    assert torch.equal(logits(out), want)
    assert torch.equal(logits(out, quantize=recipe), want)
    assert not torch.equal(want, logits(TINY))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_writes_the_same_bundle_and_opens_it(tmp_path: Path, recipe: str) -> None:
    on_cpu = written(tmp_path / "cpu", recipe, device="cpu")
    on_gpu = written(tmp_path / "gpu", recipe, device="cuda")
    assert names(on_cpu) == names(on_gpu)
    for name in names(on_cpu):
        assert (on_cpu / name).read_bytes() == (on_gpu / name).read_bytes(), name
    on_device = {"device": "cuda", "kv_dtype": "bfloat16"}
    want = logits(TINY, quantize=recipe, **on_device)
    assert torch.equal(logits(on_gpu, **on_device), want)


def test_codes_that_a_checkpoint_has_stay_as_they_are(tmp_path: Path) -> None:
    source = foreign.write(tmp_path / "gptq", foreign.tiny(), foreign.GPTQ, foreign.gptq()).path
    out = written(tmp_path / "out", "int8", source)
    assert torch.equal(logits(out), logits(source, quantize="int8"))
    assert "quantization_config" in json.loads((source / "config.json").read_text())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_loading_packs_nothing(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(*args: Any) -> Any:
        raise AssertionError("a bundle is copied")

    monkeypatch.setattr(loading, "_pack", pack)
    with open_cpu(original) as engine:
        assert engine.quantize == engine.recipe == "int4"
        assert engine.memory["weights"] == sum(
            tensor["bytes"]
            for tensor in json.loads((original / MANIFEST).read_text())["tensors"].values()
        )


def test_tensors_larger_than_a_piece_come_in_several(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PIECE_BYTES", 5000)
    assert torch.equal(logits(original), logits(TINY, quantize="int4"))


def test_layers_may_be_on_several_devices(original: Path) -> None:
    split = logits(original, device="auto", devices=["cpu", "cpu"], split=[2])
    assert torch.equal(split, logits(TINY, quantize="int4"))


def test_tensors_are_shared_out_among_files(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_writer, "SHARD_BYTES", 1 << 20)
    out = written(tmp_path / "out")
    files = sorted(out.glob("packed-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"packed-00001-of-{len(files):05}.safetensors"
    # The first holds the embedding alone, which is larger.
    assert all(file.stat().st_size < (1 << 20) + 20000 for file in files[1:])
    assert torch.equal(logits(out), logits(original))


def test_the_manifest_says_what_there_is(original: Path) -> None:
    manifest = json.loads((original / MANIFEST).read_text())
    assert manifest["source"] == Checkpoint(TINY).fingerprint
    config = Checkpoint(TINY).config
    fixed = [b for b in manifest["state"] if b["kind"] == "fixed"]
    elements = sum(torch.Size(b["shape"]).numel() for b in fixed)
    assert elements * 4 == _core.session_bytes(config, "bfloat16")[0]
    experts = manifest["tensors"]["layers.0.mlp.experts.gate_up_proj"]
    assert experts["format"] == "int4"
    assert experts["shape"][0] == config.num_experts


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    most = 0

    class Held(bytearray):
        def __del__(self) -> None:
            alive.pop()

    def packed(*args: Any) -> Held:
        nonlocal most
        alive.append(1)
        most = max(most, len(alive))
        return Held(inner(*args))

    inner = quantize._packed
    monkeypatch.setattr(quantize, "_packed", packed)
    written(tmp_path / "out")
    assert (most, alive) == (1, [])


def test_a_saved_session_goes_on_with_the_source(tmp_path: Path, original: Path) -> None:
    with open_cpu(TINY, quantize="int4") as engine, engine.session() as session:
        session.prefill(IDS)
        session.save(tmp_path / "session")
        want = session.logits.clone()
    with open_cpu(original) as engine, engine.restore(tmp_path / "session") as session:
        assert torch.equal(session.logits, want)
        assert engine.fingerprint == Checkpoint(TINY).fingerprint
    with (
        open_cpu(TINY, quantize="int8") as engine,
        pytest.raises(qwen_moe.InvalidArgument, match="recipe"),
    ):
        engine.restore(tmp_path / "session")


def test_another_file_is_another_identity(original: Path, packed: Path) -> None:
    assert Checkpoint(packed).identity != Checkpoint(original).identity
    assert Checkpoint(packed).identity == Checkpoint(packed).identity
    assert Checkpoint(packed).identity != Checkpoint(TINY).identity


# --- What is refused ------------------------------------------------------------


def test_a_newer_version_is_refused(packed: Path) -> None:
    edit(packed, lambda m: m.update(version=bundle.VERSION + 1, tensors="of another kind"))
    refused(packed, qwen_moe.FormatError, "of version 2", "reads version 1", "update the engine")


@pytest.mark.parametrize("fqn", ["layers.0.mlp.experts.down_proj", "layers.1.linear_attn.A_log"])
def test_a_flipped_bit_names_tensor_and_file(packed: Path, fqn: str) -> None:
    tensor = Checkpoint(packed).bundle.tensors[fqn]  # type: ignore[union-attr]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + tensor.bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 16]))
    refused(packed, qwen_moe.FormatError, re.escape(fqn), tensor.file.name, "checksum")


def test_damage_in_an_early_piece_leaves_the_tensor_incomplete(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another engine that loads the same bundle meanwhile must not take such a tensor for complete.
    monkeypatch.setattr(bundle, "PIECE_BYTES", 5000)
    checkpoint = Checkpoint(packed)
    assert checkpoint.bundle is not None
    tensor = checkpoint.bundle.tensors["layers.0.mlp.experts.down_proj"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff\xff\xff\xff")
    model = empty_model(checkpoint, checkpoint.identity)
    slot = next(slot for slot in model.slots if slot.fqn == tensor.fqn)
    assert slot.unit_bytes * slot.shape[0] == slot.bytes > 5000
    with pytest.raises(qwen_moe.FormatError, match="checksum"):
        list(checkpoint.bundle.put(model, [slot], 1))
    assert not next(slot for slot in model.slots if slot.fqn == tensor.fqn).resident


def test_missing_and_truncated_files_are_named(packed: Path) -> None:
    shard = next(packed.glob("packed-*"))
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    refused(packed, qwen_moe.FormatError, shard.name)
    shard.unlink()
    refused(packed, qwen_moe.FormatError, shard.name, "no such file")


def test_a_file_that_shrinks_while_open_is_named(packed: Path) -> None:
    checkpoint = Checkpoint(packed)
    shard = next(packed.glob("packed-*"))
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(qwen_moe.FormatError, match=r"lm_head.weight.*ends within"):
        loading.load(checkpoint, recipe="int4", devices=["cpu"], split=[], threads=2)


@pytest.mark.parametrize("recipe", ["int8", "int4-all"])
def test_another_recipe_is_refused(original: Path, recipe: str) -> None:
    refused(original, qwen_moe.InvalidArgument, "packed as int4", recipe, quantize=recipe)


def test_groups_that_a_gpu_does_not_take_are_refused(tmp_path: Path) -> None:
    source = foreign.write(
        tmp_path / "gptq", foreign.tiny(), foreign.GPTQ | {"group_size": 32}, foreign.gptq(group=32)
    ).path
    out = written(tmp_path / "out", "int4", source)
    assert torch.equal(logits(out), logits(source, quantize="int4"))
    with pytest.raises(qwen_moe.InvalidArgument, match=r"group 32 in .*groups of at least 64"):
        plan(Checkpoint(out), "int4", ["cuda:0"])


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_bundle_has_the_group_asked_for(tmp_path: Path, group: int) -> None:
    out = written(tmp_path / "out", group=group)
    assert torch.equal(logits(out), logits(TINY, quantize="int4", group=group))
    assert json.loads((out / MANIFEST).read_text())["group"] == group
    with open_cpu(out) as engine:
        assert engine.group == group
    with open_cpu(out, group=group):
        pass
    other = 96 - group if group < 128 else 64
    refused(out, qwen_moe.InvalidArgument, f"in groups of {group}.*group={other}", group=other)


def test_engines_of_other_groups_share_no_tensor_and_no_session(tmp_path: Path) -> None:
    with open_cpu(TINY, quantize="int4") as engine, engine.session() as session:
        session.prefill(IDS)
        session.save(tmp_path / "session")
        found = {group: logits(TINY, quantize="int4", group=group) for group in (32, 64, 128)}
    assert torch.equal(found[128], logits(TINY, quantize="int4"))
    assert not torch.equal(found[64], found[128])
    assert not torch.equal(found[32], found[64])
    with (
        open_cpu(TINY, quantize="int4", group=32) as engine,
        pytest.raises(qwen_moe.InvalidArgument, match="with group 128, this engine has 32"),
    ):
        engine.restore(tmp_path / "session")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group": 48, "quantize": "int4"}, "128, 64, 32; got 48"),
        ({"group": 64}, "group=64 says nothing without quantize"),
    ],
)
def test_a_group_that_says_nothing_is_refused(settings: dict, words: str) -> None:
    refused(TINY, qwen_moe.InvalidArgument, words, **settings)


def test_a_group_too_small_for_a_gpu_is_refused_by_name() -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match=r"group=32: a GPU takes .* at least 64"):
        plan(Checkpoint(TINY), "int4", ["cuda:0"], 32)


def test_codes_in_smaller_groups_than_asked_for_are_packed_again(tmp_path: Path) -> None:
    source = foreign.write(
        tmp_path / "gptq", foreign.tiny(), foreign.GPTQ | {"group_size": 32}, foreign.gptq(group=32)
    ).path
    out = written(tmp_path / "out", "int4", source, group=64)
    plan(Checkpoint(out), "int4", ["cuda:0"])  # which takes it now
    assert torch.equal(logits(out), logits(source, quantize="int4", group=64))
    assert not torch.equal(logits(out), logits(source, quantize="int4"))


def test_a_layout_of_another_device_is_refused(original: Path) -> None:
    checkpoint = Checkpoint(original)
    assert checkpoint.bundle is not None
    checkpoint.bundle.check(_core.plan(checkpoint.config, "int4", "bfloat16"))
    # As many bytes, so only the format tells them apart.
    with pytest.raises(qwen_moe.FormatError, match=r"embed_tokens.*bf16.*needs.*as f16"):
        checkpoint.bundle.check(_core.plan(checkpoint.config, "int4", "float16"))


def drop(manifest: dict) -> None:
    del manifest["tensors"]["norm.weight"]


def regroup(manifest: dict) -> None:
    manifest["tensors"]["lm_head.weight"]["group"] = 64


def resize(manifest: dict) -> None:
    manifest["tensors"]["norm.weight"]["bytes"] -= 4


def misplace(manifest: dict) -> None:
    manifest["tensors"]["norm.weight"]["file"] = "../other.safetensors"


def unsum(manifest: dict) -> None:
    manifest["tensors"]["norm.weight"]["crc32"] = "no sum"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, "missing: norm.weight"),
        (regroup, "lm_head.weight.*group 64.*needs.*group 128"),
        (resize, "norm.weight there"),
        (misplace, "no file name"),
        (unsum, "norm.weight.*no sum"),
        (lambda m: m.update(config="0" * 16), "config.json: its hash"),
        (lambda m: m["state"].pop(), "mutable buffers"),
        (lambda m: m.update(format="other"), "format is 'other'"),
        (lambda m: m.pop("group"), "group must be int"),
        (lambda m: m.update(tensors=[]), "tensors must be dict"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    packed: Path, change: Callable[[dict], Any], words: str
) -> None:
    edit(packed, change)
    refused(packed, qwen_moe.FormatError, words)


def test_packed_bytes_must_be_whole_units(original: Path) -> None:
    checkpoint = Checkpoint(original)
    assert checkpoint.bundle is not None
    tensor = checkpoint.bundle.tensors["lm_head.weight"]
    model = empty_model(checkpoint, "units")
    slot = next(slot for slot in model.slots if slot.fqn == tensor.fqn)
    unit = slot.unit_bytes
    with tensor.file.open("rb") as file:

        def read(size: int, at: int, fqn: str = tensor.fqn) -> int:
            return model.read_packed(fqn, file.fileno(), tensor.offset + at, size, at)

        for size, at in ((unit - 1, 0), (unit, 1), (unit, slot.bytes), (0, 0), (2 * slot.bytes, 0)):
            with pytest.raises(qwen_moe.FormatError, match="whole units"):
                read(size, at)
        with pytest.raises(qwen_moe.InvalidArgument, match="no tensor named"):
            read(unit, 0, "other.weight")
        with pytest.raises(qwen_moe.FormatError, match="cannot be read: Bad file descriptor"):
            model.read_packed(tensor.fqn, -1, 0, unit)
        assert read(slot.bytes, 0) == tensor.crc32
        model.accept(tensor.fqn)
        with pytest.raises(qwen_moe.InvalidArgument, match="is complete and in use"):
            read(unit, 0)
    with pytest.raises(BufferError):  # nothing was put yet
        memoryview(_core.PackedTensor(slot, _core.Packer(threads=1)))


@pytest.mark.parametrize("size", [0, 1, 7, 63, 64, 65, 127, 128, 129, 4096, 100_003])
def test_checksums_are_those_of_zlib(size: int) -> None:
    data = random.Random(size).randbytes(size + 8)
    for skip in (0, 3, 8):
        rest = data[skip:]
        assert _core.crc32(rest) == zlib.crc32(rest)
        both = _core.crc32_combine(zlib.crc32(data[:skip]), zlib.crc32(rest), len(rest))
        assert both == zlib.crc32(data)


def test_engines_that_open_a_bundle_at_once_share_its_tensors(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PIECE_BYTES", 5000)
    size = sum(t.bytes for t in Checkpoint(packed).bundle.tensors.values())  # type: ignore[union-attr]
    read = Counter[str]()
    put = bundle.Bundle.put

    def counted(*args: Any) -> Iterator[int]:
        for count in put(*args):
            read["bytes"] += count
            yield count

    monkeypatch.setattr(bundle.Bundle, "put", counted)
    with ThreadPoolExecutor(3) as pool:
        engines = list(pool.map(lambda _: open_cpu(packed), range(3)))
    assert read["bytes"] == size
    for engine in engines:
        engine.close()
