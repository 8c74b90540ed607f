"""Where Triton's interpreter differs from the compiler: it has no assembler and no bf16 products.

It also cuts fp32 to bf16 where the compiler rounds to nearest; tests allow for that.
"""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b):
    """a b in fp32, of bf16 operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def dot_add(a, b, total):
    """total + a b in fp32, of bf16 operands."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)
