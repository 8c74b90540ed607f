"""Codes of weights to bf16, in registers. A pair is the two inputs that share an mma register.

Sums and products of pairs are multiply-adds: before compute capability 9.0 there is nothing else.
"""

import triton
import triton.language as tl

from .interpreted import INTERPRETED


@triton.jit
def pair(word):
    """The two bf16 of a word: [...] int32 -> [..., 2]."""
    low = (word & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    high = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def twice(x):
    """x as bf16, twice in a word."""
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return bits | (bits << 16)


@triton.jit
def plain(word, low: tl.constexpr, high: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr):
    """The codes at two bits of a word, less their bias: what the assembler below does."""
    a = (((word >> low) & MASK) - BIAS).to(tl.float32)
    b = (((word >> high) & MASK) - BIAS).to(tl.float32)
    return tl.join(a, b).to(tl.bfloat16)


@triton.jit
def plain_scaled(x, high, low):
    """x [..., 2] bf16 times the sum of two words of `twice`."""
    return (x.to(tl.float32) * (pair(high).to(tl.float32) + pair(low).to(tl.float32))).to(
        tl.bfloat16
    )


@triton.jit
def widen_int4(word, high, low, high8, low8):
    """Words of eight codes -> pairs of output q, q + 8, q, q + 8.

    128 + code is exact in bf16, then 136 comes off. It is multiplied by a scale that is the sum of
    two words of `twice`, high + low of output q and high8 + low8 of output q + 8: bf16 holds 8 bits
    of a scale and the rest is low, so the weight is rounded once.
    """
    if INTERPRETED:
        a, b = plain(word, 0, 16, 15, 8), plain(word, 4, 20, 15, 8)
        c, d = plain(word, 8, 24, 15, 8), plain(word, 12, 28, 15, 8)
        a, b = plain_scaled(a, high, low), plain_scaled(b, high8, low8)
        c, d = plain_scaled(c, high, low), plain_scaled(d, high8, low8)
        return a, b, c, d
    a, b, c, d = tl.inline_asm_elementwise(
        """{
        .reg .b32 shifted, one, bias, rest, zero;
        mov.b32 one, 0x3f803f80;
        mov.b32 bias, 0xc308c308;
        mov.b32 zero, 0x80008000;
        lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, $0, one, bias;
        fma.rn.bf16x2 rest, $0, $6, zero;
        fma.rn.bf16x2 $0, $0, $5, rest;
        shr.u32 shifted, $4, 4;
        lop3.b32 $1, shifted, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $1, $1, one, bias;
        fma.rn.bf16x2 rest, $1, $8, zero;
        fma.rn.bf16x2 $1, $1, $7, rest;
        shr.u32 shifted, $4, 8;
        lop3.b32 $2, shifted, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $2, $2, one, bias;
        fma.rn.bf16x2 rest, $2, $6, zero;
        fma.rn.bf16x2 $2, $2, $5, rest;
        shr.u32 shifted, $4, 12;
        lop3.b32 $3, shifted, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $3, $3, one, bias;
        fma.rn.bf16x2 rest, $3, $8, zero;
        fma.rn.bf16x2 $3, $3, $7, rest;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [word, high, low, high8, low8],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return pair(a), pair(b), pair(c), pair(d)


@triton.jit
def widen_int8(word, high, low, high8, low8):
    """Words of four codes -> pairs of output q and q + 8; scales as above.

    bf16 keeps 8 bits: 128 + the low 7 are exact; the top bit says whether 128 or 256 comes off.
    """
    if INTERPRETED:
        a, b = plain(word, 0, 8, 255, 128), plain(word, 16, 24, 255, 128)
        a, b = plain_scaled(a, high, low), plain_scaled(b, high8, low8)
        return a, b
    a, b = tl.inline_asm_elementwise(
        """{
        .reg .b32 code, bias, rest, minus, zero;
        mov.b32 minus, 0xbf80bf80;
        mov.b32 zero, 0x80008000;
        prmt.b32 code, $2, 0, 0x4140;
        lop3.b32 bias, code, 0x00800080, 0x43804380, 0x6a;
        lop3.b32 $0, code, 0x007f007f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, bias, minus, $0;
        fma.rn.bf16x2 rest, $0, $4, zero;
        fma.rn.bf16x2 $0, $0, $3, rest;
        prmt.b32 code, $2, 0, 0x4342;
        lop3.b32 bias, code, 0x00800080, 0x43804380, 0x6a;
        lop3.b32 $1, code, 0x007f007f, 0x43004300, 0xea;
        fma.rn.bf16x2 $1, bias, minus, $1;
        fma.rn.bf16x2 rest, $1, $6, zero;
        fma.rn.bf16x2 $1, $1, $5, rest;
        }""",
        "=&r,=&r,r,r,r,r,r",
        [word, high, low, high8, low8],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    return pair(a), pair(b)
