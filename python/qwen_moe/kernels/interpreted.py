"""Where Triton's interpreter differs from the compiler: it has no assembler and no bf16 products.

It also cuts fp32 to bf16 where the compiler rounds to nearest; tests allow for that.
"""

import os

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def follow():
    """First of every kernel: waits for the kernel before it, and lets the one behind it come.

    Where launches overlap (compute capability 9.0), a kernel is on the GPU before its predecessor
    has ended, and this is where it waits for what that leaves. As every kernel does, all before it
    have ended too.
    """
    if not INTERPRETED and cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


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


@triton.jit
def finished(total):
    """A sum on the tensor cores, waited for.

    Operands in registers must stay as they are until a product has read them. A loop that only adds
    products up leaves some in flight while it writes the next operands over theirs; a use of the
    sum, here a move that costs nothing, makes it wait.
    """
    if INTERPRETED:
        return total
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1
    )
