"""What the roundings of a GPU do to logits, shown on a CPU.

Runs the model inside the package through transformers' model class in float32, once as it is and
once with every value that meets a weight rounded, and compares the logits: to bfloat16, as the
kernels of prompts do, or to float16 of a 64th, as those of decode do; keys and values to bfloat16
in either. `before` rounds a normed row as a whole, `behind` rounds w * x and divides by rms after
the product. The weights are rounded to int4 and int8 first, group by group and without a search.

    python tools/rounding.py --sequences 200 --text README.md LICENSE
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

import qwen_moe
from qwen_moe.engine import EMBEDDED

CONTEXT, POSITIONS = 40, 33
PARTED = 5e-3  # nats: further than rounding alone takes a position
# bfloat16 in recipe int4, and how many bits the others have.
DENSE = ("conv", "embed", "lm_head", ".gate.weight", "shared_expert_gate", "in_proj_b", "in_proj_a")
EIGHT_BITS = ("out_proj", "o_proj", "shared_expert")


def quantized(weight: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """The nearest codes with one float16 scale a group."""
    rows = weight.reshape(-1, group)
    most = 2 ** (bits - 1) - 1
    scale = (rows.abs().amax(-1, keepdim=True) / most).clamp_min(1e-12).half().float()
    return (torch.round(rows / scale).clamp(-most - 1, most) * scale).reshape(weight.shape)


class Rounding:
    """The model class with roundings that can be switched.

    `mode` is "none", "before" or "behind"; `half` takes float16 instead of bfloat16.
    """

    def __init__(self) -> None:
        self.mode = "none"
        self.half = False
        model = modeling.Qwen3_5MoeForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
        self.model = model.eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and not any(part in name for part in DENSE):
                weight.copy_(quantized(weight, 8 if any(p in name for p in EIGHT_BITS) else 4))
        for name, module in model.named_modules():
            if isinstance(module, modeling.Qwen3_5MoeRMSNorm) and "_norm" not in name:
                module.forward = self._norm_of(module)
            elif isinstance(module, modeling.Qwen3_5MoeExperts):
                module.forward = self._experts_of(module)
            elif name.endswith(("out_proj", "o_proj", "shared_expert.down_proj")):
                module.register_forward_pre_hook(lambda _, args: (self.rounded(args[0]),))
            elif name.endswith(("q_norm", "k_norm", "v_proj")):
                module.register_forward_hook(lambda _, args, out: self.cached(out))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """What the tensor cores take of x."""
        if self.mode == "none":
            return x
        return (x / 64).half().float() * 64 if self.half else x.bfloat16().float()

    def cached(self, x: torch.Tensor) -> torch.Tensor:
        """What the cache keeps of keys and values, and what they meet."""
        return x if self.mode == "none" else x.bfloat16().float()

    def _norm_of(self, norm: modeling.Qwen3_5MoeRMSNorm) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            inverse_rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
            if self.mode == "behind":
                return self.rounded(x * (1 + norm.weight)) * inverse_rms
            return self.rounded(x * inverse_rms * (1 + norm.weight))

        return forward

    def _experts_of(self, experts: modeling.Qwen3_5MoeExperts) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, picks: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            for expert in range(experts.num_experts):
                token, rank = (picks == expert).nonzero(as_tuple=True)
                gate, up = (x[token] @ experts.gate_up_proj[expert].T).chunk(2, -1)
                act = self.rounded(torch.nn.functional.silu(gate) * up)
                part = act @ experts.down_proj[expert].T
                out.index_add_(0, token, part * weights[token, rank, None])
            return out

        return forward

    def logits(self, rows: torch.Tensor, mode: str, half: bool = False) -> torch.Tensor:
        """[sequences, POSITIONS, vocab] after the context."""
        self.mode, self.half = mode, half
        return torch.cat([self.model(part).logits[:, CONTEXT:].double() for part in rows.split(10)])


def main() -> None:
    """Print a line for each way to round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=200)
    args = parser.parse_args()
    ids = qwen_moe.Tokenizer(EMBEDDED).encode("".join(path.read_text() for path in args.text))
    length = CONTEXT + POSITIONS
    draw = random.Random(1)
    starts = [draw.randrange(len(ids) - length) for _ in range(args.sequences)]
    rows = torch.tensor([ids[start : start + length] for start in starts])
    with torch.no_grad():
        model = Rounding()
        want = model.logits(rows, "none")
        for mode, half in (("before", False), ("behind", False), ("behind", True)):
            got = model.logits(rows, mode, half)
            error = (got - want).norm(dim=-1) / want.norm(dim=-1)
            p, q = want.log_softmax(-1), got.log_softmax(-1)
            nats = (p.exp() * (p - q)).sum(-1)
            parted = nats > PARTED
            print(
                f"{mode}, {'fp16' if half else 'bf16'}: L2 median {error.median():.2e}, "
                f"KL median {nats.median():.2e}; parted: "
                f"{parted.double().mean():.1%} of positions, {parted.any(-1).double().mean():.1%} "
                f"of sequences, at most {parted.sum(-1).max()} of {POSITIONS}; the largest median "
                f"of a sequence: L2 {error.median(-1).values.max():.2e}, "
                f"KL {nats.median(-1).values.max():.2e}"
            )


if __name__ == "__main__":
    main()
