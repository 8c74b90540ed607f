"""GGUF files: the logits of their weights in transformers, and their tokenizer."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import foreign
import oracle
import qwen_moe
from qwen_moe import shards
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.plan import plan
from qwen_moe.quantize import quantize
from qwen_moe.tokenizer import Tokenizer
from test_formats import assert_same_model, engine_logits, kept, open_cpu, refused, tiny_ids

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
import gguf_files  # noqa: E402
from gguf_files import Kind  # noqa: E402

BF16 = Kind.BF16
SHAPES = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
}
TOLERANCE = 3e-4  # kept codes meet activations in 16-bit fixed point


def source() -> tuple[dict, foreign.Tensors]:
    """Two value heads to a key head, so that the order of value heads shows."""
    config, tensors = foreign.random(**SHAPES)
    assert config["linear_num_value_heads"] == 2 * config["linear_num_key_heads"] > 2
    return config, tensors


def matrices(kind: Kind, rest: Kind = BF16) -> Callable[[str], Kind]:
    """`kind` for every matrix but the embedding and the small ones."""
    return lambda fqn: rest if any(part in fqn for part in gguf_files.EXACT) else kind


def like_q4_k_m(fqn: str) -> Kind:
    """Several types beside each other, as llama.cpp mixes them."""
    if "embed_tokens" in fqn or "in_proj_z" in fqn or "experts.gate_up" in fqn:
        return Kind.Q4_K
    if "lm_head" in fqn or "v_proj" in fqn or "down_proj" in fqn:
        return Kind.Q6_K
    return Kind.F32 if "mlp.gate." in fqn or "shared_expert_gate" in fqn else Kind.Q8_0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (matrices(BF16), []),
        (matrices(Kind.F16, Kind.F16), []),
        (matrices(Kind.Q8_0), ["codes and scales of 26 gguf matrices are kept as they are"]),
        (matrices(Kind.Q4_0), ["codes and scales of 26 gguf matrices are kept as they are"]),
        (
            lambda fqn: Kind.Q4_0 if "experts" in fqn else Kind.Q8_0,
            [
                "codes and scales of 26 gguf matrices are kept as they are",
                "8 gguf matrices are dequantized to bfloat16",
            ],
        ),
        (matrices(Kind.Q4_K), ["26 gguf matrices are dequantized to bfloat16"]),
        (matrices(Kind.Q6_K), ["26 gguf matrices are dequantized to bfloat16"]),
        (
            like_q4_k_m,
            [
                "codes and scales of 13 gguf matrices are kept as they are",
                "18 gguf matrices are dequantized to bfloat16",
            ],
        ),
    ],
    ids=["BF16", "F16", "Q8_0", "Q4_0", "Q4_0 experts", "Q4_K", "Q6_K", "Q4_K_M"],
)
def test_gguf_gives_the_logits_of_its_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Callable[[str], Kind], said: list[str]
) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), kind)
    with caplog.at_level("INFO", "qwen_moe"):
        assert_same_model(written, oracle.prompt(40), tolerance=TOLERANCE)
    assert kept(caplog) == said


def test_the_blocks_of_the_test_stand_for_the_values_they_were_made_of() -> None:
    data = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    for kind, most in ((Kind.Q4_K, 0.15), (Kind.Q6_K, 0.03)):
        got = gguf.dequantize(gguf_files.quantized(data, kind), kind)
        assert np.abs(got - data).max() < most * np.abs(data).max()


def test_tiny_as_gguf_needs_no_other_file(tmp_path: Path) -> None:
    written = gguf_files.write(
        tmp_path / "tiny.gguf", foreign.tiny(), matrices(Kind.Q8_0), tokenizer=True
    )
    assert_same_model(written, tiny_ids())
    with open_cpu(written.path) as engine, open_cpu(foreign.TINY) as plain:
        assert engine.eos_token_ids == plain.eos_token_ids
        text = "It's <|im_start|>user\nnaïve 12 e\u0301!  \n\n<|im_end|>"
        assert engine.tokenizer.encode(text) == plain.tokenizer.encode(text)
        cuts = [
            e.tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(
                "\u0928\u092e\u0938\u094d 12, I'm"
            )
            for e in (engine, plain)
        ]
        assert cuts[0] == cuts[1]
        messages = [{"role": "user", "content": "hello"}]
        want = plain.tokenizer.apply_chat_template(messages)
        assert engine.tokenizer.apply_chat_template(messages) == want
        greedy = qwen_moe.SamplingParams(max_tokens=12)
        got, want = (e.generate(["She had never"], greedy)[0] for e in (engine, plain))
        assert got.text == want.text


def test_a_split_file_and_a_directory_open_alike(tmp_path: Path) -> None:
    one = gguf_files.write(tmp_path / "one" / "m.gguf", source(), matrices(Kind.Q4_0))
    ids = oracle.prompt(6)
    want = engine_logits(one.path, ids)
    several = gguf_files.write(tmp_path / "n" / "m.gguf", source(), matrices(Kind.Q4_0), splits=3)
    assert torch.equal(engine_logits(several.path, ids), want)
    assert torch.equal(engine_logits(tmp_path / "n", ids), want)
    missing = tmp_path / "n" / "m-00002-of-00003.gguf"
    missing.unlink()
    refused(several.path, qwen_moe.FormatError, r"m-00002-of-00003\.gguf: no such file")
    shutil.copy(one.path, tmp_path / "n" / "other.gguf")
    refused(tmp_path / "n", qwen_moe.InvalidArgument, r"2 GGUF models.*m-00001.*other\.gguf")


def test_gguf_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), like_q4_k_m)
    ids = oracle.prompt(4)
    want = engine_logits(written.path, ids)
    monkeypatch.setattr(qwen_moe.loading, "PIECE_BYTES", 64 * 256 * 4)
    monkeypatch.setattr(shards, "WINDOW_BYTES", 100_000)
    assert torch.equal(engine_logits(written.path, ids), want)


def test_a_recipe_packs_what_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), like_q4_k_m)
    with caplog.at_level("WARNING", "qwen_moe"):
        logits = engine_logits(written.path, oracle.prompt(4), quantize="int4")
    assert kept(caplog) == [
        "13 gguf matrices are dequantized and quantized again, which adds to their error"
    ]
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        (like_q4_k_m, "int4"),
        (matrices(Kind.Q4_0), "int8"),
        (matrices(Kind.F16, Kind.F16), "int4-all"),
    ],
    ids=["Q4_K_M", "Q4_0", "F16"],
)
def test_a_bundle_of_a_gguf_file_opens_like_it(
    tmp_path: Path, kind: Callable[[str], Kind], recipe: str
) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), kind)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}')  # of another model
    quantize(written.path, tmp_path / "out", recipe=recipe)
    ids = oracle.prompt(12)
    want = engine_logits(written.path, ids, quantize=recipe)
    assert torch.equal(engine_logits(tmp_path / "out", ids), want)
    with open_cpu(tmp_path / "out") as out, open_cpu(written.path, quantize=recipe) as plain:
        assert out.fingerprint == plain.fingerprint
        assert out.dtype == plain.dtype
        assert out.group == plain.group


def test_a_bundle_takes_the_tokenizer_out_of_a_gguf_file(tmp_path: Path) -> None:
    written = gguf_files.write(
        tmp_path / "tiny.gguf", foreign.tiny(), matrices(Kind.Q8_0), tokenizer=True
    )
    quantize(written.path, tmp_path / "out", recipe="int8")
    written.path.unlink()
    with open_cpu(tmp_path / "out") as engine, open_cpu(foreign.TINY) as plain:
        assert engine.eos_token_ids == plain.eos_token_ids
        text = "It's <|im_start|>user\nnaïve 12 e\u0301!  \n\n<|im_end|>"
        assert engine.tokenizer.encode(text) == plain.tokenizer.encode(text)
        messages = [{"role": "user", "content": "hello"}]
        want = plain.tokenizer.apply_chat_template(messages)
        assert engine.tokenizer.apply_chat_template(messages) == want


def test_groups_of_a_gguf_file_become_those_of_a_gpu(tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), matrices(Kind.Q4_0))
    quantize(written.path, tmp_path / "as_it_is", recipe="int4")
    with pytest.raises(qwen_moe.InvalidArgument, match=r"write it again with a larger --group"):
        plan(Checkpoint(tmp_path / "as_it_is"), "int4", ["cuda:0"])
    quantize(written.path, tmp_path / "out", recipe="int4", group=64)
    assert plan(Checkpoint(tmp_path / "out"), "int4", ["cuda:0"]).group == 64


def test_tensors_for_further_tokens_are_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, tensors = source()
    config = config | {"num_hidden_layers": 4}
    extra = {
        name.replace(".layers.2.", ".layers.3."): tensor
        for name, tensor in tensors.items()
        if ".layers.2." in name
    }
    changes = {"nextn_predict_layers": 1}
    written = gguf_files.write(
        tmp_path / "model.gguf", (config, tensors | extra), matrices(BF16), changes=changes
    )
    with caplog.at_level("INFO", "qwen_moe"), open_cpu(written.path) as engine:
        assert engine.config.num_hidden_layers == 3
    assert kept(caplog) == [f"skipped {len(extra) + 1} mtp tensors"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"ssm.group_count": None}, "FormatError", "ssm.group_count is missing in the metadata"),
        ({"block_count": None}, "FormatError", "block_count is None"),
        ({"expert_used_count": 9}, "InvalidArgument", "num_experts_per_tok"),
        (
            {"embedding_length": 512},
            "FormatError",
            r"token_embd\.weight \[384, 256\].*\[384, 512\]",
        ),
        ({"block_count": 4}, "FormatError", r"model\.gguf: \d+ of the model's tensors are missing"),
    ],
    ids=str,
)
def test_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict, error: str, words: str
) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), matrices(BF16), changes=changes)
    refused(written.path, getattr(qwen_moe, error), words)


def test_a_broken_file_is_refused_by_name(tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), matrices(Kind.Q8_0))
    data = written.path.read_bytes()
    for broken in (b"", data[:3], b"GGML" + data[4:], data[:2000], data[:-5000]):
        written.path.write_bytes(broken)
        refused(written.path, qwen_moe.FormatError, r"model\.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    words = "general.architecture is 'llama'; this engine runs qwen35moe"
    refused(tmp_path / "a.gguf", qwen_moe.InvalidArgument, words)


def test_a_type_that_is_not_read_is_refused_by_tensor(tmp_path: Path) -> None:
    written = gguf_files.write(
        tmp_path / "model.gguf", source(), lambda fqn: Kind.TQ2_0 if "o_proj" in fqn else BF16
    )
    words = r"blk\.2\.attn_output\.weight .*TQ2_0.*only F32, F16, .*Q6_K are read"
    refused(written.path, qwen_moe.FormatError, words)


def test_a_scale_that_is_not_finite_is_refused_by_tensor(tmp_path: Path) -> None:
    config, tensors = source()
    kinds = {"Q8_0": r"ffn_down_exps\.weight .*expert 1, output feature 3", "Q4_K": "not finite"}
    for name, words in kinds.items():
        file = tmp_path / f"{name}.gguf"
        written = gguf_files.write(file, (config, tensors), matrices(Kind[name]))
        entry = next(
            t for t in gguf.GGUFReader(file).tensors if t.name == "blk.1.ffn_down_exps.weight"
        )
        at = entry.data_offset + entry.n_bytes // 4 + 3 * entry.n_bytes // 4 // 256
        data = bytearray(file.read_bytes())
        data[at : at + 2] = b"\x00\x7e"  # a NaN in float16
        file.write_bytes(data)
        refused(written.path, qwen_moe.FormatError, words)


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(tmp_path / "a.gguf", qwen_moe.InvalidArgument, r"pip install 'qwen_moe\[gguf\]'")


def test_a_tokenizer_beside_the_file_stands_in(tmp_path: Path) -> None:
    written = gguf_files.write(tmp_path / "model.gguf", source(), matrices(BF16))
    with open_cpu(written.path) as engine:
        with pytest.raises(qwen_moe.FormatError) as caught:
            _ = engine.tokenizer
        assert re.search(r"tokenizer\.ggml\.model is missing.*tokenizer\.json", str(caught.value))
        assert len(engine.generate([[1, 2, 3]])[0].token_ids) > 0
    shutil.copy(foreign.TINY / "tokenizer.json", tmp_path)
    with open_cpu(written.path) as engine:
        want = Tokenizer(foreign.TINY).encode("hello there")
        assert engine.tokenizer.encode("hello there") == want
