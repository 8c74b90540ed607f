"""Peak memory of loading, and that opening sessions costs nothing that was not reserved.

Each measurement has a process of its own. Peaks are the kernel's VmHWM, which counts pages of
mapped files too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import oracle

MIB = 2**20
CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 48,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 350 MiB in bf16, most of it experts."""
    path = tmp_path_factory.mktemp("memory") / "large"
    config = oracle.text_config(**CONFIG)
    with torch.device("meta"):
        shapes = {
            name: weight.shape
            for name, weight in oracle.Qwen3_5MoeForCausalLM(config).state_dict().items()
        }
    noise = (torch.randn(2**22, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()

    def fill(shape: torch.Size) -> torch.Tensor:
        count = shape.numel()
        return noise.repeat(-(-count // noise.numel()))[:count].view(shape)

    path.mkdir()
    layers = [
        {name: fill(shape) for name, shape in shapes.items() if f".{i}." in name} for i in (0, 1)
    ]
    rest = {n: fill(s) for n, s in shapes.items() if not any(n in layer for layer in layers)}
    weight_map = {}
    for i, tensors in enumerate([*layers, rest]):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(path)
    oracle.save_tokenizer(path, CONFIG["vocab_size"])
    return path


MEASURE = """
    import json, sys
    import torch
    import qwen_moe

    def status(field):
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith(field + ":"))
        return int(line.split()[1]) * 1024

    def memory():
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        return status("VmRSS")

    path, settings = sys.argv[1], json.loads(sys.argv[2])
    with qwen_moe.Engine(device="cpu", max_sessions=1, max_context=64) as warm:
        warm.generate(["a"], qwen_moe.SamplingParams(max_tokens=2))

    out = {"before": memory()}
    engine = qwen_moe.Engine(path, device="cpu", max_context=256, **settings)
    out["peak"], out["after"] = status("VmHWM"), status("VmRSS")
    out["ledger"] = engine.memory

    out["before second"] = memory()
    second = qwen_moe.Engine(path, device="cpu", max_context=256, **settings)
    out["peak second"] = status("VmHWM")
    second.close()

    # Touch every slot and page once; then sessions come and go in what is reserved.
    def all_sessions():
        sessions = [engine.session() for _ in range(engine.capacity.max_sessions)]
        for session in sessions:
            session.prefill([5] * 255)
            session.decode(qwen_moe.SamplingParams(max_tokens=1))
        for session in sessions:
            session.close()

    for _ in range(2):
        all_sessions()
    out["before sessions"] = memory()
    for _ in range(3):
        all_sessions()
    out["peak sessions"] = status("VmHWM")
    out["ledger later"] = engine.memory
    print(json.dumps(out))
"""


def measure(path: Path, **settings) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_loading_peaks_near_what_stays_and_sessions_stay_in_it(
    large: Path, quantize: str | None
) -> None:
    source = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert source > 300 * MIB
    got = measure(large, quantize=quantize, max_sessions=4)
    report = {name: value // MIB for name, value in got.items() if isinstance(value, int)}

    ledger = got["ledger"]
    parts = {name: size for name, size in ledger.items() if name != "total"}
    assert ledger["total"] == sum(parts.values())
    weights = ledger["weights"]
    assert weights < (0.45 if quantize else 1.05) * source
    assert weights > (0.25 if quantize else 0.95) * source
    stays = got["after"] - got["before"]
    assert stays <= ledger["total"] + 16 * MIB, f"more stays than the ledger names: {report}"
    assert stays >= 0.9 * weights, f"the ledger names more than is there: {report}"
    assert got["peak"] - got["before"] <= 1.2 * stays, f"peak while loading: {report}"

    again = got["peak second"] - got["before second"]
    assert again <= ledger["total"] - weights + 0.1 * weights, f"weights are copied: {report}"

    assert got["peak sessions"] - got["before sessions"] <= 4 * MIB, report
    assert got["ledger later"] == ledger
