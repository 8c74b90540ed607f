"""Checkpoints that other tools quantized: the logits of their weights in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import foreign
import oracle
import qwen_moe
from qwen_moe import shards
from qwen_moe.__main__ import main
from qwen_moe.checkpoint import Checkpoint

TOLERANCE = 1e-4  # max |difference| / max |logit|
TEXT = "The old man went down to the sea in the morning, and the wind was in the west."


def open_cpu(path: Path, **settings: Any) -> qwen_moe.Engine:
    defaults = {"device": "cpu", "max_sessions": 1, "max_context": 128, "kv_dtype": "float32"}
    return qwen_moe.Engine(path, **(defaults | settings))


def engine_logits(path: Path, ids: list[int], **settings: Any) -> torch.Tensor:
    """[ids, vocab]: each token is a step of its own."""
    rows = []
    with open_cpu(path, **settings) as engine, engine.session() as session:
        for token in ids:
            session.prefill([token])
            rows.append(session.logits.clone())
    return torch.stack(rows)


def tiny_ids() -> list[int]:
    with qwen_moe.Engine(device="cpu", max_sessions=1, max_context=64) as engine:
        return list(engine.tokenizer.encode(TEXT))


def assert_same_model(
    written: foreign.Written, ids: list[int], *, tolerance: float = TOLERANCE
) -> None:
    want = written.logits(ids)
    error = oracle.relative_error(engine_logits(written.path, ids), want.numpy())
    assert error <= tolerance, f"logits are off by {error:.2e}"
    plain = foreign.tiny()[1] if want.shape[1] == 4096 else None
    if plain is not None:
        unquantized = engine_logits(foreign.TINY, ids)
        assert oracle.relative_error(unquantized, want.numpy()) > 10 * TOLERANCE


def refused(path: Path, error: type[Exception], words: str, **settings: Any) -> None:
    with pytest.raises(error) as caught, open_cpu(path, **settings):
        pass
    assert re.search(words, str(caught.value)), str(caught.value)


def expert(suffix: str, layer: int = 1, index: int = 2, kind: str = "up_proj") -> str:
    return f"model.language_model.layers.{layer}.mlp.experts.{index}.{kind}.{suffix}"


# --- FP8 -----------------------------------------------------------------------


@pytest.mark.parametrize("keep_fused", [False, True], ids=["per expert", "fused"])
def test_fp8_gives_the_logits_of_its_values(tmp_path: Path, keep_fused: bool) -> None:
    written = foreign.write(
        tmp_path / "fp8", foreign.tiny(), foreign.FP8, foreign.fp8, keep_fused=keep_fused
    )
    assert_same_model(written, tiny_ids())


def test_fp8_blocks_may_end_within_a_matrix(tmp_path: Path) -> None:
    source = foreign.random(hidden_size=192, moe_intermediate_size=96, num_experts=4)
    written = foreign.write(tmp_path / "fp8", source, foreign.FP8, foreign.fp8)
    assert_same_model(written, oracle.prompt(40))


def test_fp8_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = foreign.write(tmp_path / "fp8", foreign.tiny(), foreign.FP8, foreign.fp8)
    ids = tiny_ids()[:8]
    want = engine_logits(written.path, ids)
    monkeypatch.setattr(qwen_moe.loading, "PIECE_BYTES", 192 * 256 * 4)  # cuts blocks in two
    monkeypatch.setattr(shards, "WINDOW_BYTES", 100_000)
    assert torch.equal(engine_logits(written.path, ids), want)


Change = Callable[[foreign.Tensors], None]


def without(name: str) -> Change:
    def change(tensors: foreign.Tensors) -> None:
        del tensors[name]

    return change


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(tensors: foreign.Tensors) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def with_value(at: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        dtype = tensor.dtype
        tensor = tensor.float()
        tensor[at] = value
        return tensor.to(dtype)

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(expert("weight_scale_inv")), r"up_proj\.weight .*weight_scale_inv are missing"),
        (
            put(expert("weight_scale_inv"), lambda t: torch.cat([t, t])),
            r"up_proj\.weight_scale_inv \[2, 2\].*need scales of \[1, 2\]",
        ),
        (put(expert("weight_scale_inv"), torch.Tensor.int), r"weight_scale_inv .*I32.*must be one"),
        (
            put(expert("weight_scale_inv"), with_value((0, 1), float("inf"))),
            r"up_proj\.weight_scale_inv .*not finite",
        ),
        (put(expert("weight"), with_value((3, 5), float("nan"))), r"experts\.gate_up_proj.*finite"),
        (put(expert("weight"), lambda t: t[:64]), r"\[64, 256\].*need|\[64, 256\].*needs shape"),
    ],
    ids=["missing", "shape", "dtype", "infinite scale", "nan", "weight shape"],
)
def test_a_defect_of_fp8_is_refused_by_name(tmp_path: Path, change: Change, words: str) -> None:
    written = foreign.write(tmp_path / "fp8", foreign.tiny(), foreign.FP8, foreign.fp8)
    foreign.edit(written.path, change)
    refused(written.path, qwen_moe.FormatError, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fmt": "e5m2"}, "fmt .*'e5m2'; only e4m3"),
        ({"weight_block_size": None}, r"weight_block_size .*None.*\[128, 128\]"),
        ({"quant_method": "nvfp4"}, "quant_method .*'nvfp4'; this engine reads fp8"),
    ],
    ids=str,
)
def test_another_kind_of_fp8_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    source = foreign.random(num_experts=2)
    written = foreign.write(tmp_path / "fp8", source, foreign.FP8, foreign.fp8)
    foreign.configure(written.path, **settings)
    refused(written.path, qwen_moe.InvalidArgument, words)


# --- Four bits in int32 words --------------------------------------------------


def kept(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage().partition(": ")[2] for r in caplog.records if r.name == "qwen_moe"]


# Kept codes meet activations in 16-bit fixed point, which transformers does not have.
@pytest.mark.parametrize(
    ("settings", "quantize", "only", "count"),
    [
        (foreign.GPTQ, foreign.gptq(), foreign.EXPERTS, 16),
        (foreign.GPTQ, foreign.gptq(group=32), foreign.EXPERTS, 16),
        (foreign.GPTQ | {"dynamic": None}, foreign.gptq(), foreign.LINEARS, 66),
        (
            foreign.GPTQ | {"dynamic": None, "group_size": -1},
            foreign.gptq(group=1 << 20),
            foreign.EXPERTS,
            16,
        ),
        (
            foreign.GPTQ | {"checkpoint_format": "gptq_v2"},
            foreign.gptq(version=2),
            foreign.EXPERTS,
            16,
        ),
        (foreign.COMPRESSED, foreign.compressed(), foreign.LINEARS, 66),
    ],
    ids=[
        "gptq",
        "gptq, groups of 32",
        "gptq, all linears",
        "gptq, one group",
        "gptq_v2",
        "compressed-tensors",
    ],
)
def test_symmetric_int4_is_kept_as_it_is(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict,
    quantize: foreign.Quantizer,
    only: tuple[str, ...],
    count: int,
) -> None:
    written = foreign.write(tmp_path / "int4", foreign.tiny(), settings, quantize, only=only)
    ids = tiny_ids()
    with caplog.at_level("INFO", "qwen_moe"):
        assert_same_model(written, ids)
    method = settings["quant_method"]
    assert kept(caplog) == [f"codes and scales of {count} {method} matrices are kept as they are"]
    with open_cpu(written.path) as engine, open_cpu(foreign.TINY) as plain:
        assert engine.memory["weights"] < 0.75 * plain.memory["weights"]


def test_info_counts_what_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = foreign.write(
        tmp_path / "int4", foreign.tiny(), foreign.COMPRESSED, foreign.compressed()
    )
    assert main(["info", str(written.path)]) == 0
    row = re.search(r"^compressed-tensors +([\d.]+) MiB", capsys.readouterr().out, re.M)
    with open_cpu(written.path) as engine:
        assert row is not None
        assert float(row[1]) == pytest.approx(engine.memory["weights"] / 2**20, abs=0.1)


def test_one_of_several_matrices_with_the_same_input_may_be_int4(tmp_path: Path) -> None:
    some = (".in_proj_z.", ".v_proj.", ".shared_expert.up_proj.", ".o_proj.")
    written = foreign.write(
        tmp_path / "int4", foreign.tiny(), foreign.GPTQ, foreign.gptq(group=64), only=some
    )
    assert_same_model(written, tiny_ids())


def test_a_recipe_leaves_int4_that_is_there_as_it_is(tmp_path: Path) -> None:
    everything = foreign.write(
        tmp_path / "int4", foreign.tiny(), foreign.COMPRESSED, foreign.compressed()
    )
    ids = tiny_ids()[:6]
    # The tied head is all that is left to quantize.
    want = engine_logits(everything.path, ids, quantize="int4")
    assert torch.equal(engine_logits(everything.path, ids, quantize="int4-all"), want)
    error = oracle.relative_error(want, everything.logits(ids).numpy())
    assert TOLERANCE < error < 0.2


@pytest.mark.parametrize(
    ("settings", "quantize"),
    [
        (foreign.AWQ, foreign.awq),
        (foreign.GPTQ | {"sym": False, "dynamic": None}, foreign.gptq(symmetric=False)),
        (foreign.COMPRESSED, foreign.compressed(symmetric=False)),
        (foreign.GPTQ, foreign.gptq(group=16)),
    ],
    ids=["awq", "gptq", "compressed-tensors", "gptq, groups of 16"],
)
def test_int4_that_does_not_fit_is_dequantized_and_says_so(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    settings: dict,
    quantize: foreign.Quantizer,
) -> None:
    def as_loaded(matrix: torch.Tensor) -> tuple[foreign.Tensors, torch.Tensor]:
        parts, values = quantize(matrix)
        return parts, values.bfloat16().float()

    written = foreign.write(tmp_path / "int4", foreign.tiny(), settings, as_loaded)
    if settings is foreign.COMPRESSED:
        group = settings["config_groups"]["group_0"]
        weights = group["weights"] | {"symmetric": False}
        foreign.configure(written.path, config_groups={"group_0": group | {"weights": weights}})
    ids = tiny_ids()
    with caplog.at_level("INFO", "qwen_moe"):
        assert_same_model(written, ids)
    method = settings["quant_method"]
    assert kept(caplog) == [f"66 {method} matrices are dequantized to bfloat16"]
    caplog.clear()
    again = engine_logits(written.path, ids[:4], quantize="int4")
    assert kept(caplog) == [
        f"66 {method} matrices are dequantized and quantized again, which adds to their error"
    ]
    assert 0 < oracle.relative_error(again, written.logits(ids[:4]).numpy()) < 0.3


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "compressed, zero points"])
def test_int4_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    settings, quantize = {
        "gptq": (foreign.GPTQ | {"dynamic": None}, foreign.gptq()),
        "awq": (foreign.AWQ, foreign.awq),
        "compressed-tensors": (foreign.COMPRESSED, foreign.compressed()),
        "compressed, zero points": (foreign.COMPRESSED, foreign.compressed(symmetric=False)),
    }[method]
    written = foreign.write(tmp_path / "int4", foreign.tiny(), settings, quantize)
    ids = tiny_ids()[:4]
    want = engine_logits(written.path, ids)
    monkeypatch.setattr(qwen_moe.loading, "PIECE_BYTES", 64 * 256 * 4)
    monkeypatch.setattr(shards, "WINDOW_BYTES", 100_000)
    assert torch.equal(engine_logits(written.path, ids), want)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "compressed-tensors"])
def test_any_rows_of_a_matrix_can_be_read(tmp_path: Path, method: str) -> None:
    settings, quantize = {
        "fp8": (foreign.FP8, foreign.fp8),
        "gptq": (foreign.GPTQ | {"sym": False}, foreign.gptq(symmetric=False)),
        "awq": (foreign.AWQ, foreign.awq),
        "compressed-tensors": (foreign.COMPRESSED, foreign.compressed(symmetric=False)),
    }[method]
    written = foreign.write(
        tmp_path / "some", foreign.tiny(), settings, quantize, only=foreign.EXPERTS
    )
    weight = Checkpoint(written.path).weights["layers.3.mlp.experts.5.down_proj.weight"]
    want = written.weights["model.layers.3.mlp.experts.down_proj"][5]
    with shards.Shards() as opened:
        whole = weight.read(opened, 0, 256)
        torch.testing.assert_close(whole, want, rtol=2**-8, atol=0)
        for begin, end in [(0, 1), (3, 21), (127, 129), (250, 256)]:
            assert torch.equal(weight.read(opened, begin, end), whole[begin:end])


def shuffled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flip(0)


SCALES, QZEROS, QWEIGHT, G_IDX = (expert(part) for part in ("scales", "qzeros", "qweight", "g_idx"))
PACKED, SCALE = expert("weight_packed"), expert("weight_scale")


@pytest.mark.parametrize(
    ("method", "change", "words"),
    [
        ("gptq", without(SCALES), r"experts\.2\.up_proj\.scales, which belongs to it, is missing"),
        ("gptq", without(QZEROS), r"up_proj\.qzeros, which belongs to it, is missing"),
        ("gptq", put(SCALES, lambda t: t[:1].repeat(3, 1)), r"scales .*3 groups do not divide 256"),
        ("gptq", put(SCALES, with_value((1, 7), float("nan"))), r"scale of output feature 7.*nan"),
        ("gptq", put(QZEROS, lambda t: t + 1), r"qzeros .*zero point is 9; .*must be 8"),
        ("gptq", put(QWEIGHT, torch.Tensor.long), r"qweight .*I64.*I32"),
        ("gptq", put(QWEIGHT, lambda t: t[:16]), r"scales .*|needs"),
        ("gptq", put(G_IDX, shuffled), r"g_idx .*act-order, desc_act.*desc_act=False"),
        ("awq", without(SCALES), r"up_proj\.scales, which belongs to it, is missing"),
        ("awq", put(SCALES, with_value((0, 3), float("inf"))), r"output feature 3.*inf"),
        ("awq", put(QZEROS, lambda t: t[:, :8]), r"qzeros \[2, 8\].*needs \[2, 16\]"),
        ("compressed", without(SCALE), r"weight_scale, which belongs to it, is missing"),
        ("compressed", put(SCALE, lambda t: t[:, :1].repeat(1, 3)), r"3 groups do not divide 256"),
        (
            "compressed",
            put(SCALE, with_value((5, 1), 1e6)),
            r"weight_packed.*\.safetensors.*999424 does not fit float16",
        ),
        ("compressed", put(PACKED, lambda t: t.float()), r"weight_packed .*float32.*I32"),
        (
            "compressed",
            put(expert("weight_shape"), lambda t: t.flip(0)),
            r"weight_shape.*says \[256, 128\]; the packed codes are \[128, 256\]",
        ),
    ],
)
def test_a_defect_of_int4_is_refused_by_name(
    tmp_path: Path, method: str, change: Change, words: str
) -> None:
    settings, quantize = {
        "gptq": (foreign.GPTQ, foreign.gptq()),
        "awq": (foreign.AWQ, foreign.awq),
        "compressed": (foreign.COMPRESSED, foreign.compressed()),
    }[method]
    written = foreign.write(
        tmp_path / "int4", foreign.tiny(), settings, quantize, only=foreign.EXPERTS
    )
    foreign.edit(written.path, change)
    refused(written.path, qwen_moe.FormatError, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (foreign.GPTQ | {"bits": 8}, "bits .* is 8; of GPTQ only 4"),
        (foreign.GPTQ | {"bits": None}, "bits .* is None"),
        (foreign.GPTQ | {"desc_act": True}, "desc_act .*act-order.*desc_act=False"),
        (foreign.GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format .*'marlin'"),
        (foreign.AWQ | {"bits": 3}, "bits .* is 3; of AWQ only 4"),
        (foreign.AWQ | {"version": "gemv"}, "version .*'gemv'.*gemm"),
        (foreign.COMPRESSED | {"format": "float-quantized"}, "format .*'float-quantized'"),
    ],
    ids=str,
)
def test_int4_of_another_kind_is_refused(tmp_path: Path, settings: dict, words: str) -> None:
    source = foreign.random(num_experts=2)
    written = foreign.write(tmp_path / "int4", source, settings, lambda m: ({"weight": m}, m))
    refused(written.path, qwen_moe.InvalidArgument, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": {"num_bits": 8, "type": "int"}}, "weights.num_bits of group_0 .*is 8"),
        ({"weights": {"num_bits": 4, "type": "float"}}, "weights.type of group_0 .*'float'"),
        ({"input_activations": {"num_bits": 8}}, "group_0 .*input_activations.*W4A16"),
        ({"actorder": "group"}, "actorder of group_0 .*'group'"),
    ],
    ids=str,
)
def test_another_scheme_of_compressed_tensors_is_refused(
    tmp_path: Path, changes: dict, words: str
) -> None:
    group = foreign.COMPRESSED["config_groups"]["group_0"]
    if "actorder" in changes:
        changes = {"weights": group["weights"] | changes}
    settings = foreign.COMPRESSED | {"config_groups": {"group_0": group | changes}}
    source = foreign.random(num_experts=2)
    written = foreign.write(tmp_path / "int4", source, settings, lambda m: ({"weight": m}, m))
    refused(written.path, qwen_moe.InvalidArgument, words)


def test_a_group_size_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    written = foreign.write(
        tmp_path / "gptq", foreign.tiny(), foreign.GPTQ | {"dynamic": None}, foreign.gptq(group=64)
    )
    words = r"scales .*4 groups of 256 input features are 64 each; group_size .* is 128"
    refused(written.path, qwen_moe.FormatError, words)
