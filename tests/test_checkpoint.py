"""Checkpoints: every layout of the same weights gives the same bits; defects are named."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_moe
from qwen_moe import _core, loading, shards
from qwen_moe.checkpoint import Checkpoint
from qwen_moe.config import parse_config
from qwen_moe.weights import Weight

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
Tensors = dict[str, torch.Tensor]


def prefixed(fqn: str) -> str:
    return fqn if fqn == "lm_head.weight" else f"model.{fqn}"


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    random = torch.Generator().manual_seed(0)
    slots = _core.plan(parse_config(CONFIG, "config"), "none", "float32")
    return {
        prefixed(slot.fqn): (torch.randn(slot.shape, generator=random) * 0.3)
        .to(torch.bfloat16)
        .to(dtype)
        for slot in slots
    }


def write(
    path: Path, tensors: Tensors, config: dict | None = None, *, shards: int = 1, **changes: Any
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps((config or CONFIG) | changes))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    weight_map = {}
    for index in range(shards):
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index_file = path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def open_small(path: Path, **settings: Any) -> qwen_moe.Engine:
    defaults = {"device": "cpu", "max_sessions": 1, "threads": 1, "kv_dtype": "float32"}
    return qwen_moe.Engine(path, **(defaults | settings))


def logits(path: Path, **settings: Any) -> torch.Tensor:
    with open_small(path, **settings) as engine, engine.session() as session:
        session.prefill(list(range(3, 150)))
        assert torch.isfinite(session.logits).all()
        return session.logits


def per_expert(tensors: Tensors) -> Tensors:
    """One tensor per expert and projection, as transformers saves them."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        experts, _, kind = name.rpartition(".")
        if kind == "down_proj" and experts.endswith(".experts"):
            split |= {f"{experts}.{i}.down_proj.weight": e for i, e in enumerate(tensor.unbind())}
        elif kind == "gate_up_proj":
            for index, expert in enumerate(tensor.unbind()):
                gate, up = (half.clone() for half in expert.chunk(2))
                split[f"{experts}.{index}.gate_proj.weight"] = gate
                split[f"{experts}.{index}.up_proj.weight"] = up
        else:
            split[name] = tensor
    return {name: tensor.clone() for name, tensor in split.items()}


def multimodal(tensors: Tensors) -> tuple[Tensors, dict]:
    """As the published checkpoints lay it out, with what this engine does not read."""
    nested = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
    nested["model.visual.blocks.0.attn.proj.weight"] = torch.zeros(2, 2)
    nested["model.visual.patch_embed.proj.bias"] = torch.zeros(2)
    nested["mtp.fc.weight"] = torch.zeros(3)
    text = {key: value for key, value in CONFIG.items() if key != "architectures"}
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": {"hidden_size": 32},
    }
    return nested, config


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "checkpoint", random_tensors())


# --- Layouts ------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_every_layout_of_the_same_weights_gives_the_same_bits(
    plain: Path, tmp_path: Path, quantize: str | None
) -> None:
    tensors = random_tensors()
    want = logits(plain, quantize=quantize)
    layouts = {
        "sharded": write(tmp_path / "a", tensors, shards=3),
        "per expert": write(tmp_path / "b", per_expert(tensors), shards=2),
        "multimodal": write(tmp_path / "c", *multimodal(tensors)),
        "named by dtype alone": write(tmp_path / "d", tensors, dtype=None, torch_dtype="bfloat16"),
    }
    for name, path in layouts.items():
        assert torch.equal(logits(path, quantize=quantize), want), name


def test_older_config_fields_mean_the_same(plain: Path, tmp_path: Path) -> None:
    older = {k: v for k, v in CONFIG.items() if k not in ("rope_parameters", "layer_types")}
    older |= {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "full_attention_interval": 2}
    path = write(tmp_path / "older", random_tensors(), older)
    assert torch.equal(logits(path), logits(plain))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("layout", ["fused", "per expert"])
def test_small_pieces_give_the_same_bits(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None, layout: str
) -> None:
    path = plain
    if layout == "per expert":
        path = write(tmp_path / "experts", per_expert(random_tensors()), shards=2)
    want = logits(path, quantize=quantize)
    reads = []
    parts = shards.OpenFiles.parts
    monkeypatch.setattr(loading, "READ_BYTES", 9000)  # an expert, and 64 rows of a matrix
    monkeypatch.setattr(
        shards.OpenFiles, "parts", lambda *args: reads.append(parts(*args)) or reads[-1]
    )
    assert torch.equal(logits(path, quantize=quantize), want)
    sizes = [sum(size for _, _, size in read) for read in reads]
    assert max(sizes) <= 9000
    assert len(sizes) > 40


@pytest.mark.parametrize("quantize", [None, "int8", "int4-all"])
@pytest.mark.parametrize("where", ["top level", "nested"])
def test_a_tied_head_is_the_embedding(tmp_path: Path, where: str, quantize: str | None) -> None:
    tensors = random_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    untied = logits(write(tmp_path / "untied", tensors), quantize=quantize)
    del tensors["lm_head.weight"]
    if where == "top level":
        tied = write(tmp_path / "tied", tensors, tie_word_embeddings=True)
    else:
        nested, config = multimodal(tensors)
        config["text_config"]["tie_word_embeddings"] = True
        tied = write(tmp_path / "tied", nested, config)
    assert torch.equal(logits(tied, quantize=quantize), untied)


def test_two_devices_hold_a_tied_embedding_each(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["lm_head.weight"]
    path = write(tmp_path / "tied", tensors, tie_word_embeddings=True)
    two = logits(path, device="auto", devices=["cpu", "cpu"])
    assert torch.equal(two, logits(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_are_read_as_what_they_are(
    plain: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    path = write(tmp_path / name, random_tensors(dtype), dtype=name)
    assert Checkpoint(path).dtype == name
    # The same values, but activations round like the weights' dtype or not at all.
    torch.testing.assert_close(logits(path), logits(plain), rtol=0.1, atol=0.1)


def test_small_tensors_may_have_another_dtype(plain: Path, tmp_path: Path) -> None:
    small = ("norm.weight", "A_log", "dt_bias", "conv1d.weight", "mlp.gate.weight", "_a.weight")
    tensors = {
        name: tensor.float() if name.endswith(small) else tensor
        for name, tensor in random_tensors().items()
    }
    assert torch.equal(logits(write(tmp_path / "mixed", tensors)), logits(plain))


def test_the_embedded_checkpoint_needs_no_path() -> None:
    with qwen_moe.Engine(device="cpu", max_sessions=1) as engine:
        assert engine.path.name == "tiny"
        size = sum(f.stat().st_size for f in engine.path.iterdir() if f.is_file())
        assert size <= 24 * 2**20


# --- What is skipped, ignored, shared -----------------------------------------


def test_vision_and_mtp_tensors_are_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "c", *multimodal(random_tensors()))
    with caplog.at_level(logging.INFO, "qwen_moe"), open_small(path):
        pass
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "2 vision and 1 mtp" in record.getMessage()


def test_unknown_tensors_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"model.layers.0.extra.{i}": torch.zeros(1) for i in range(7)}
    with open_small(write(tmp_path / "extra", random_tensors() | extra)):
        pass
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "7 unknown tensors" in record.getMessage()
    assert "model.layers.0.extra.0" in record.getMessage()


def test_a_second_engine_reads_no_weights_again(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = logits(plain)
    with open_small(plain):
        monkeypatch.setattr(shards.OpenFiles, "parts", None)
        assert torch.equal(logits(plain), want)
        with pytest.raises(TypeError):  # another recipe is another copy
            logits(plain, quantize="int4")


def test_a_checkpoint_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = write(tmp_path / "same", tensors)
    with open_small(path) as engine:
        tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
        write(path, tensors)
        assert not torch.equal(logits(path), _logits_of(engine))


def _logits_of(engine: qwen_moe.Engine) -> torch.Tensor:
    with engine.session() as session:
        session.prefill(list(range(3, 150)))
        return session.logits


def test_a_copied_checkpoint_opens_saved_sessions_and_a_changed_one_does_not(
    plain: Path, tmp_path: Path
) -> None:
    with open_small(plain) as engine, engine.session() as session:
        session.prefill([1, 2, 3])
        session.save(tmp_path / "session")
        want = session.logits
    shutil.copytree(plain, tmp_path / "copy")
    with open_small(tmp_path / "copy") as engine, engine.restore(tmp_path / "session") as session:
        assert torch.equal(session.logits, want)
    tensors = random_tensors()
    tensors["lm_head.weight"] *= 2
    changed = write(tmp_path / "changed", tensors)
    with (
        open_small(changed) as engine,
        pytest.raises(qwen_moe.InvalidArgument, match="checkpoint"),
    ):
        engine.restore(tmp_path / "session")


def test_dummy_weights_need_only_a_config_and_are_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    first = logits(tmp_path, load_format="dummy", quantize="int4")
    assert torch.equal(logits(tmp_path, load_format="dummy", quantize="int4"), first)
    assert first.std() > 0
    with pytest.raises(qwen_moe.FormatError, match=r"model\.safetensors"):
        open_small(tmp_path)


def test_progress_shows_when_asked_for_and_only_then(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_small(plain):
        pass
    assert capsys.readouterr().err == ""
    with open_small(plain, progress=True, quantize="int4"):
        pass
    shown = capsys.readouterr()
    assert "loading as int4" in shown.err
    assert shown.out == ""


# --- Defects ------------------------------------------------------------------


@pytest.fixture
def nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise AssertionError("memory was taken before the checkpoint was checked")

    monkeypatch.setattr(_core, "Model", allocate)


def broken(path: Path, defect: str) -> None:
    """Make one defect in a good checkpoint of one file."""
    file = path / "model.safetensors"
    data, tensors = file.read_bytes(), load_file(file)
    if defect == "no file":
        file.unlink()
    elif defect == "empty file":
        file.write_bytes(b"")
    elif defect == "truncated":
        file.write_bytes(data[:-100])
    elif defect == "truncated header":
        file.write_bytes(data[:50])
    elif defect == "header is no JSON":
        file.write_bytes(data[:8] + b"x" + data[9:])
    elif defect == "header is too long":
        file.write_bytes(struct.pack("<Q", 1 << 40) + data[8:])
    elif defect == "more behind":
        file.write_bytes(data + b"\0")
    else:
        change(tensors, defect)
        save_file(tensors, file)


def change(tensors: Tensors, defect: str) -> None:
    if defect == "tensor missing":
        del tensors[GATE_UP]
    elif defect == "many missing":
        for name in [name for name in tensors if ".linear_attn." in name]:
            del tensors[name]
    elif defect == "wrong shape":
        tensors[DOWN] = tensors[DOWN].transpose(1, 2).contiguous()
    elif defect == "wrong vector":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    elif defect == "wrong dtype":
        tensors[DOWN] = tensors[DOWN].to(torch.float8_e4m3fn)
    elif defect == "double vector":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    elif defect == "mixed dtypes":
        tensors[DOWN] = tensors[DOWN].half()
    elif defect == "twice":
        tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()
    elif defect == "expert missing":
        experts = per_expert(tensors)
        tensors.clear()
        tensors |= experts
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    elif defect == "expert too many":
        experts = per_expert(tensors)
        experts["model.layers.1.mlp.experts.4.up_proj.weight"] = torch.zeros(1)
        tensors.clear()
        tensors |= experts


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("no file", r"model\.safetensors"),
        ("empty file", r"model\.safetensors"),
        ("truncated", r"model\.safetensors.*not fully covered"),
        ("truncated header", r"model\.safetensors"),
        ("header is no JSON", r"model\.safetensors"),
        ("header is too long", r"model\.safetensors"),
        ("more behind", r"model\.safetensors"),
        ("tensor missing", r"model\.safetensors: 1 .*layers\.1\.mlp\.experts\.gate_up_proj"),
        ("many missing", r"model\.safetensors: 9 .*layers\.0\.linear_attn\..*\.\.\."),
        ("wrong shape", rf"{DOWN} \[4, 32, 64\].*model\.safetensors.*\[4, 64, 32\]"),
        ("wrong vector", r"model\.norm\.weight \[63\].*model\.safetensors.*\[64\]"),
        ("wrong dtype", rf"{DOWN}.*F8_E4M3"),
        ("double vector", r"model\.norm\.weight.*F64"),
        ("mixed dtypes", rf"{DOWN}.*float16.*bfloat16"),
        ("twice", r"norm\.weight and .*norm\.weight are the same"),
        ("expert missing", r"1 .*layers\.1\.mlp\.experts\.2\.up_proj\.weight"),
        ("expert too many", r"experts\.4\.up_proj.*4 experts"),
    ],
)
@pytest.mark.usefixtures("nothing_is_allocated")
def test_a_defect_is_refused_by_name_before_anything_is_allocated(
    tmp_path: Path, defect: str, words: str
) -> None:
    path = write(tmp_path / "broken", random_tensors())
    broken(path, defect)
    with pytest.raises(qwen_moe.FormatError) as caught:
        open_small(path)
    assert re.search(words, str(caught.value)), str(caught.value)


def test_a_weight_that_is_not_finite_is_refused_with_its_file(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors[DOWN][2, 5, 7] = float("nan")
    path = write(tmp_path / "nan", tensors)
    with pytest.raises(qwen_moe.FormatError, match=r"nan/model\.safetensors: .*down_proj.*finite"):
        open_small(path)
    assert torch.isfinite(logits(write(path, random_tensors()))).all(), "something was left behind"


def test_a_shard_that_is_cut_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "cut", per_expert(random_tensors()), shards=3)
    checkpoint = Checkpoint(path)
    last = checkpoint.tensors["layers.1.mlp.experts.3.down_proj.weight"].file
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size // 2)
    with pytest.raises(qwen_moe.FormatError, match=rf"{last}: the file ends within"):
        loading.load(checkpoint, recipe="int4", devices=["cpu"], split=[], threads=2)


@pytest.mark.parametrize("when", ["before loading", "once its tensors were found"])
def test_a_shard_that_is_gone_since_it_was_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    path = write(tmp_path / "gone", per_expert(random_tensors()), shards=3)
    checkpoint = Checkpoint(path)
    last = checkpoint.tensors["layers.1.mlp.experts.3.down_proj.weight"].file
    if when == "before loading":
        last.unlink()
    else:
        find = Checkpoint.sources

        def sources(self: Checkpoint, slots: Iterable[_core.TensorSlot]) -> dict[str, Weight]:
            found = find(self, slots)
            last.unlink()
            return found

        monkeypatch.setattr(Checkpoint, "sources", sources)
    with pytest.raises(qwen_moe.FormatError, match=re.escape(str(last))):
        loading.load(checkpoint, recipe="int4", devices=["cpu"], split=[], threads=2)


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("shard missing", r"model-00002-of-00003\.safetensors"),
        ("shard truncated", r"model-00002-of-00003\.safetensors"),
        ("tensor elsewhere", r"model-00001.*holds no tensor model\.norm\.weight"),
        ("outside", r"index\.json.*\.\./stolen\.safetensors"),
        ("no map", r"index\.json: weight_map"),
        ("no JSON", r"index\.json"),
    ],
)
@pytest.mark.usefixtures("nothing_is_allocated")
def test_a_defect_of_shards_is_refused_by_name(tmp_path: Path, defect: str, words: str) -> None:
    path = write(tmp_path / "broken", random_tensors(), shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    if defect == "shard missing":
        shard.unlink()
    elif defect == "shard truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif defect == "no JSON":
        index.write_text("{")
    else:
        placed = table["weight_map"]
        moved = {"model.norm.weight": "model-00001-of-00003.safetensors"}
        if placed["model.norm.weight"] == moved["model.norm.weight"]:
            moved = {"model.norm.weight": "model-00002-of-00003.safetensors"}
            words = words.replace("00001", "00002")
        outside = {"model.norm.weight": "../stolen.safetensors"}
        table["weight_map"] = {
            "tensor elsewhere": placed | moved,
            "outside": placed | outside,
            "no map": [],
        }[defect]
        index.write_text(json.dumps(table))
    with pytest.raises(qwen_moe.FormatError) as caught:
        open_small(path)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["Qwen3NextForCausalLM"]}, "architectures.*Qwen3NextForCausalLM"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attn_output_gate": False}, "attn_output_gate"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type is 'yarn'"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "quant_method of quantization_config is 'bitsandbytes'; this engine reads fp8",
        ),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"head_dim": 40}, "head_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"layer_types": ["linear_attention", "sliding_attention"]}, "sliding_attention"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads"),
    ],
    ids=str,
)
def test_a_config_that_cannot_run_is_refused_by_field(
    tmp_path: Path, changes: dict, words: str
) -> None:
    path = write(tmp_path / "config", {}, **changes)
    with pytest.raises(qwen_moe.InvalidArgument) as caught:
        open_small(path, load_format="dummy")
    assert "config.json" in str(caught.value)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "64"}, "hidden_size must be an integer"),
        ({"num_experts": True}, "num_experts must be an integer"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
    ids=str,
)
def test_a_malformed_config_is_refused_by_field(tmp_path: Path, changes: dict, words: str) -> None:
    path = write(tmp_path / "config", {}, **changes)
    with pytest.raises(qwen_moe.FormatError) as caught:
        open_small(path, load_format="dummy")
    assert "config.json" in str(caught.value)
    assert re.search(words, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    "field", ["vocab_size", "head_dim", "num_experts", "moe_intermediate_size"]
)
def test_a_missing_field_is_refused_by_name(tmp_path: Path, field: str) -> None:
    path = write(tmp_path / "config", {}, {k: v for k, v in CONFIG.items() if k != field})
    with pytest.raises(qwen_moe.FormatError, match=rf"config\.json: {field} is missing"):
        open_small(path, load_format="dummy")


@pytest.mark.parametrize("content", [None, "", "[1]", "{"], ids=repr)
def test_a_missing_or_broken_config_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(qwen_moe.FormatError, match=r"config\.json"):
        open_small(tmp_path)


@pytest.mark.parametrize("path", ["nowhere", "Qwen/Qwen3.5-35B-A3B"])
def test_a_path_that_is_no_directory_is_refused(path: str) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match="not a directory"):
        open_small(Path(path))


def test_an_unknown_load_format_is_refused(plain: Path) -> None:
    with pytest.raises(qwen_moe.InvalidArgument, match=r"load_format.*'gguf'"):
        open_small(plain, load_format="gguf")
