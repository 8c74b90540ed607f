"""RMSNorm of rows of the residual stream, written as what meets a weight."""

import triton
import triton.language as tl

from .interpreted import follow
from .tiles import fragment_order

TYPES = {
    "out": "*bf16",
    "x": "*fp32",
    "weight": "*fp32",
    "columns": "i32/16",
    "eps": "fp32",
}


@triton.jit
def rms_norm(out, x, weight, columns, eps, BLOCK: tl.constexpr):
    """out = x / sqrt(mean(x^2) + eps) * weight, in fragment order. Grid (rows).

    Args:
        out: bf16 [rows, columns].
        x: fp32 [rows, columns].
        weight: fp32 [columns], 1 + w of the checkpoint.
        columns: A multiple of 64, at most BLOCK.
    """
    follow()
    row = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(x + row + column, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / columns + eps)
    value = value * scale * tl.load(weight + column, mask=inside, other=0.0)
    value = tl.reshape(fragment_order(tl.reshape(value, (1, BLOCK)), 1, BLOCK), (BLOCK,))
    tl.store(out + row + column, value.to(tl.bfloat16), mask=inside)
