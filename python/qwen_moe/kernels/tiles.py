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

from .interpreted import INTERPRETED, dot, dot_add


@triton.jit
def pair(word):
    """The two bf16 of a word: [...] int32 -> [..., 2]."""
    low = (word & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def nibbles(word, p: tl.constexpr):
    """Codes p and p + 4 of eight, less 8."""
    low = ((word >> (4 * p)) & 15) - 8
    high = ((word >> (4 * p + 16)) & 15) - 8
    return tl.join(low.to(tl.float32), high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def octets(word, p: tl.constexpr):
    """Codes 2 p and 2 p + 1 of four, less 128."""
    low = ((word >> (16 * p)) & 255) - 128
    high = ((word >> (16 * p + 8)) & 255) - 128
    return tl.join(low.to(tl.float32), high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def widen_int4(word):
    """[...] words of eight codes -> four [..., 2] bf16: 128 + code is exact, then less 136."""
    if INTERPRETED:
        return nibbles(word, 0), nibbles(word, 1), nibbles(word, 2), nibbles(word, 3)
    a, b, c, d = tl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, bias;
        mov.b32 bias, 0x43084308;
        lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
        sub.bf16x2 $0, $0, bias;
        shr.u32 shifted, $4, 4;
        lop3.b32 $1, shifted, 0x000f000f, 0x43004300, 0xea;
        sub.bf16x2 $1, $1, bias;
        shr.u32 shifted, $4, 8;
        lop3.b32 $2, shifted, 0x000f000f, 0x43004300, 0xea;
        sub.bf16x2 $2, $2, bias;
        shr.u32 shifted, $4, 12;
        lop3.b32 $3, shifted, 0x000f000f, 0x43004300, 0xea;
        sub.bf16x2 $3, $3, bias;
        }""",
        "=&r,=&r,=&r,=&r,r",
        [word],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return pair(a), pair(b), pair(c), pair(d)


@triton.jit
def widen_int8(word):
    """[...] words of four codes -> two [..., 2] bf16.

    bf16 keeps 8 bits: 128 + the low 7 are exact; the top bit says whether 128 or 256 comes off.
    """
    if INTERPRETED:
        return octets(word, 0), octets(word, 1)
    a, b = tl.inline_asm_elementwise(
        """{
        .reg .b32 code, bias;
        prmt.b32 code, $2, 0, 0x4140;
        lop3.b32 bias, code, 0x00800080, 0x43804380, 0x6a;
        lop3.b32 $0, code, 0x007f007f, 0x43004300, 0xea;
        sub.bf16x2 $0, $0, bias;
        prmt.b32 code, $2, 0, 0x4342;
        lop3.b32 bias, code, 0x00800080, 0x43804380, 0x6a;
        lop3.b32 $1, code, 0x007f007f, 0x43004300, 0xea;
        sub.bf16x2 $1, $1, bias;
        }""",
        "=&r,=&r,r",
        [word],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return pair(a), pair(b)


@triton.jit
def expand(words, BITS: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """[R tiles, U units of words] int32 -> [16 R outputs, 64 U inputs in fragment order] bf16."""
    if BITS == 4:
        a, b, c, d = widen_int4(tl.reshape(words, (R, U, 8, 4, 4)))
        w = tl.join(tl.join(a, c), tl.join(b, d))  # R U q t s h r o
        w = tl.permute(w, (0, 7, 2, 1, 4, 6, 3, 5))
    elif BITS == 8:
        a, b = widen_int8(tl.reshape(words, (R, U, 2, 8, 4, 2, 2)))
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
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    """W X^T of some tiles and rows: [BN, BM] fp32.

    A group of inputs with one scale is summed on the tensor cores over exact codes, and only the
    sum is scaled: the same arithmetic as in decode, and no weight is rounded. The order of the sum
    is that of the inputs, whatever rows are beside it.

    Args:
        codes: int32, codes of the first tile; `scales` is fp16, its scales.
        tile_offset: [BN / 16] int64, words from there to each tile.
        x: bf16 rows in fragment order, at `row_offset` [BM] int64; rows without `row_mask` are 0.
        k: Inputs, a multiple of GROUP.
    """
    units: tl.constexpr = GROUP // 64
    step: tl.constexpr = units * 32 * BITS
    code_ptrs = codes + tile_offset[:, None] + tl.arange(0, step)[None, :]
    x_ptrs = x + row_offset[:, None] + tl.arange(0, GROUP)[None, :]
    total = tl.zeros((BN, BM), tl.float32)
    if BITS == 16:
        for _ in range(k // GROUP):
            words = tl.load(code_ptrs)
            rows = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            total = dot_add(expand(words, BITS, BN // 16, units), tl.trans(rows), total)
            code_ptrs += step
            x_ptrs += GROUP
    else:
        scale_ptrs = scales + (tile_offset * 2)[:, None] + tl.arange(0, 16)[None, :]
        for _ in range(k // GROUP):
            words = tl.load(code_ptrs)
            scale = tl.load(scale_ptrs)
            rows = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            part = dot(expand(words, BITS, BN // 16, units), tl.trans(rows))
            total += part * tl.reshape(scale, (BN,)).to(tl.float32)[:, None]
            code_ptrs += step
            scale_ptrs += 16
            x_ptrs += GROUP
    return total
