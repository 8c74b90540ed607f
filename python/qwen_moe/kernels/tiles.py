"""Weight tiles of the device form (csrc/cuda/tile.cuh) as operands of tensor-core products.

A tile holds 16 outputs, and its codes lie in the order in which an mma fragment takes them: lane
4 q + t of a warp has the outputs q and q + 8. `expand` only renames those dimensions, so a tile
goes from memory to the registers of the A operand with no shuffle. The price is that the inputs k
come in *fragment order*: in every 32 inputs, place 16 s + 8 r + 2 t + h holds input
8 t + 4 s + 2 r + h. So whatever meets a weight is written in fragment order by the kernel that
makes it (`fragment_order`).
"""

import triton
import triton.language as tl

from .interpreted import dot_add, finished
from .widen import pair, twice, widen_int4, widen_int8


@triton.jit
def over_words(scale, BITS: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """fp32 [R, 8] of outputs q -> twice as bf16 in a word, in the shape of a tile's words."""
    scale = twice(scale)
    if BITS == 4:
        scale = tl.broadcast_to(scale[:, None, :, None, None], (R, U, 8, 4, 4))
    else:
        scale = tl.broadcast_to(scale[:, None, None, :, None, None, None], (R, U, 2, 8, 4, 2, 2))
    return scale


@triton.jit
def split_scales(scale, BITS: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """fp16 [R, 16] -> what widen.py takes: the upper bits and the rest of outputs q, then q + 8."""
    scale = scale.to(tl.float32)
    upper = scale.to(tl.bfloat16).to(tl.float32)
    high, high8 = tl.split(tl.permute(tl.reshape(upper, (R, 2, 8)), (0, 2, 1)))
    low, low8 = tl.split(tl.permute(tl.reshape(scale - upper, (R, 2, 8)), (0, 2, 1)))
    high, high8 = over_words(high, BITS, R, U), over_words(high8, BITS, R, U)
    low, low8 = over_words(low, BITS, R, U), over_words(low8, BITS, R, U)
    return high, low, high8, low8


@triton.jit
def expand(words, scale, BITS: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """[R tiles, U units of words] int32 -> bf16 weights [16 R outputs, 64 U inputs].

    Args:
        scale: fp16 [R, 16] of one group; anything for bf16 weights.
    """
    if BITS == 4:
        high, low, high8, low8 = split_scales(scale, BITS, R, U)
        w = tl.reshape(words, (R, U, 8, 4, 4))
        a, b, c, d = widen_int4(w, high, low, high8, low8)
        w = tl.join(tl.join(a, c), tl.join(b, d))  # R U q t s h r o
        w = tl.permute(w, (0, 7, 2, 1, 4, 6, 3, 5))
    elif BITS == 8:
        high, low, high8, low8 = split_scales(scale, BITS, R, U)
        w = tl.reshape(words, (R, U, 2, 8, 4, 2, 2))
        a, b = widen_int8(w, high, low, high8, low8)
        w = tl.join(a, b)  # R U s/2 q t s%2 r h o
        w = tl.permute(w, (0, 8, 3, 1, 2, 5, 6, 4, 7))
    else:
        w = pair(tl.reshape(words, (R, U, 4, 8, 4, 2, 2)))  # R U s q t r o h
        w = tl.permute(w, (0, 6, 3, 1, 2, 5, 4, 7))
    return tl.reshape(w, (16 * R, 64 * U))


@triton.jit
def fragment_order(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, columns] -> the same with every 32 columns in fragment order."""
    x = tl.reshape(x, (ROWS, COLUMNS // 32, 4, 2, 2, 2))
    x = tl.permute(x, (0, 1, 3, 4, 2, 5))
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def multiply(
    codes,
    scales,
    tile_offset,
    x,
    row_offset,
    row_mask,
    k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """W X^T of some tiles and rows: [BN, BM] fp32.

    Weights meet the tensor cores scaled, each rounded to bf16 once; decode scales the sums of a
    group instead. So there is one set of sums, and the tensor cores need not be waited for in every
    step. The order of the sum is that of the inputs, whatever rows are beside it and whatever the
    tile and the step.

    Args:
        codes: int32, codes of the first tile; `scales` is fp16, its scales.
        tile_offset: [BN / 16] int64, words from there to each tile.
        x: bf16 rows in fragment order, at `row_offset` [BM] int64; rows without `row_mask` are 0.
        k: Inputs, a multiple of GROUP.
        STEP: Inputs at a time, 64 or a group.
    """
    units: tl.constexpr = STEP // 64
    words_step: tl.constexpr = units * 32 * BITS
    code_ptrs = codes + tile_offset[:, None] + tl.arange(0, words_step)[None, :]
    x_ptrs = x + row_offset[:, None] + tl.arange(0, STEP)[None, :]
    scale_ptrs = scales + (tile_offset * 2)[:, None] + tl.arange(0, 16)[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    for i in range(k // STEP):
        words = tl.load(code_ptrs)
        rows = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
        scale = words
        if BITS < 16:
            scale = tl.load(scale_ptrs + i * STEP // GROUP * 16)
        w = expand(words, scale, BITS, BN // 16, units)
        total = finished(dot_add(w, tl.trans(rows), total))
        code_ptrs += words_step
        x_ptrs += STEP
    return total
