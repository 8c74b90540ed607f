"""Writing a bundle: whole or not at all, and gone on with after an interruption."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_moe
from bundles import TINY, logits, names, refused, written
from qwen_moe import bundle_writer, quantize
from qwen_moe.__main__ import main
from qwen_moe.checkpoint import Checkpoint

# --- Writing --------------------------------------------------------------------


def assert_nothing_there(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


def fail_after(monkeypatch: pytest.MonkeyPatch, tensors: int, error: BaseException) -> None:
    count = iter(range(tensors))
    write = bundle_writer.ShardWriter.write

    def failing(self: bundle_writer.ShardWriter, slot: Any, data: memoryview) -> None:
        if next(count, None) is None:
            raise error
        write(self, slot, data)

    monkeypatch.setattr(bundle_writer.ShardWriter, "write", failing)


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_after(monkeypatch, 20, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(qwen_moe.InvalidArgument, match="No space left on device"):
        written(tmp_path / "out")
    assert_nothing_there(tmp_path / "out")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path) -> None:
    with file_limit(4 << 20), pytest.raises(qwen_moe.InvalidArgument, match="File too large"):
        written(tmp_path / "out")
    assert_nothing_there(tmp_path / "out")


def test_no_room_is_said_before_anything_is_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    fail_after(monkeypatch, 0, AssertionError("it began"))
    with pytest.raises(qwen_moe.InvalidArgument, match=r"8\.3 MiB.*1\.0 MiB"):
        written(tmp_path / "out")
    assert_nothing_there(tmp_path / "out")


def count_packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    packed: list[str] = []
    inner = quantize._packed

    def counted(planned: Any, slot: Any, *rest: Any) -> Any:
        packed.append(slot.fqn)
        return inner(planned, slot, *rest)

    monkeypatch.setattr(quantize, "_packed", counted)
    return packed


def interrupted(out: Path, monkeypatch: pytest.MonkeyPatch, tensors: int, **settings: Any) -> Path:
    """What is left when the run is stopped after some tensors."""
    with monkeypatch.context() as patched:
        fail_after(patched, tensors, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            written(out, **settings)
    assert not out.exists()
    return bundle_writer.partial_of(out)


def same_files(one: Path, other: Path) -> None:
    assert names(one) == names(other)
    for name in names(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("tensors", [0, 20])
def test_what_an_interrupted_run_leaves_does_not_open_and_is_gone_on_with(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch, tensors: int
) -> None:
    monkeypatch.setattr(bundle_writer, "SHARD_BYTES", 1 << 20)  # more than one file
    want = written(tmp_path / "want")
    partial = interrupted(tmp_path / "out", monkeypatch, tensors)
    refused(partial, qwen_moe.FormatError, "holds neither")
    partial = interrupted(tmp_path / "out", monkeypatch, 7)  # again, further on
    packed = count_packed(monkeypatch)
    out = written(tmp_path / "out")
    total = len(Checkpoint(out).bundle.tensors)  # type: ignore[union-attr]
    assert len(packed) == total - tensors - 7
    assert names(tmp_path) == ["out", "want"]
    same_files(out, want)


def test_what_is_damaged_since_is_written_again(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = interrupted(tmp_path / "out", monkeypatch, 20)
    file = partial / "packed-00001-of-00001.safetensors"
    with file.open("r+b") as opened:  # the embedding, which is the first
        opened.seek(100_000)
        opened.write(b"damaged")
    with (partial / bundle_writer._JOURNAL).open("a") as journal:
        journal.write('["norm.we')  # a killed run
    packed = count_packed(monkeypatch)
    out = written(tmp_path / "out")
    assert packed[0] == "embed_tokens.weight"
    assert len(packed) == len(Checkpoint(out).bundle.tensors) - 19  # type: ignore[union-attr]
    same_files(out, original)


@pytest.mark.parametrize("other", [{"recipe": "int8"}, {"group": 64}], ids=str)
def test_what_another_run_left_is_written_over(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch, other: dict
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(bundle_writer, "SHARD_BYTES", 1 << 20)  # its files have other names
        interrupted(tmp_path / "out", monkeypatch, 20, **other)
    same_files(written(tmp_path / "out"), original)


def test_what_is_left_of_another_source_of_the_same_shapes_is_written_over(
    tmp_path: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(TINY, tmp_path / "other"))
    tensors = load_file(TINY / "model.safetensors")
    save_file({n: t.flip(-1).contiguous() for n, t in tensors.items()}, other / "model.safetensors")
    interrupted(tmp_path / "out", monkeypatch, 20, source=other)
    same_files(written(tmp_path / "out"), original)


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_after(monkeypatch, 20, KeyboardInterrupt())
    assert main(["quantize", str(TINY), str(tmp_path / "out"), "--recipe", "int4"]) == 130
    assert f"goes on with what is in {tmp_path / 'out.partial'}" in capsys.readouterr().err


def test_another_process_that_writes_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        (partial / "mine").touch()
        with pytest.raises(qwen_moe.InvalidArgument, match="another process is writing"):
            written(tmp_path / "out")
        assert (partial / "mine").exists()
    finally:
        os.close(handle)
    with pytest.raises(qwen_moe.InvalidArgument, match="not from a run before"):
        written(tmp_path / "out")
    assert (partial / "mine").exists()


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(qwen_moe.InvalidArgument, match=r"there already; --force"):
        written(out)
    with pytest.raises(qwen_moe.InvalidArgument, match="this directory is none"):
        written(out, force=True)
    with pytest.raises(qwen_moe.InvalidArgument, match="no directory"):
        written(out / "precious", force=True)
    assert names(out) == ["precious"]
    assert names(tmp_path) == ["out"]


def test_force_replaces_a_bundle(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        fail_after(patched, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            written(packed, "int8", force=True)
    assert torch.equal(logits(packed), logits(TINY, quantize="int4"))  # the old one is still there
    assert names(packed.parent) == [packed.name, f"{packed.name}.partial"]
    written(packed, "int8", force=True)
    assert names(packed.parent) == [packed.name]
    assert torch.equal(logits(packed), logits(TINY, quantize="int8"))


def test_a_replacement_that_cannot_be_renamed_keeps_the_old(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(qwen_moe.InvalidArgument, match="Input/output error"):
        written(packed, "int8", force=True)
    assert names(packed.parent) == [packed.name]
    assert torch.equal(logits(packed), logits(TINY, quantize="int4"))


def test_a_bundle_is_no_source(tmp_path: Path, original: Path) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="a bundle already"):
        written(tmp_path / "out", "int8", original)
    assert_nothing_there(tmp_path / "out")


def test_a_recipe_must_quantize(tmp_path: Path) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="recipe must be one of"):
        written(tmp_path / "out", "none")


# --- The command line -----------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", str(TINY), str(out), "--recipe", "int4"]
    assert main(command) == 0
    assert "as int4" in capsys.readouterr().out

    def reply(*options: str) -> str:
        arguments = ["--device", "cpu", "--temperature", "0", "--max-tokens", "12"]
        assert main(["generate", "Once upon a time", *arguments, *options]) == 0
        return capsys.readouterr().out

    assert reply("--model", str(out)) == reply("--quantize", "int4")
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert main(["info", str(out)]) == 0
    table = capsys.readouterr().out.partition("quantize")[2]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["int4"]
