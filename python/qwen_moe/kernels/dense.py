"""Projections of many rows: weight tiles times bf16 rows in fragment order."""

import triton
import triton.language as tl

from .interpreted import follow
from .tiles import fragment_order, multiply

TYPES = {
    "out": "*bf16",
    "x": "*bf16",
    "codes": "*i32",
    "scales": "*fp16",
    "row_gate": "*fp32",
    "rows": "i32",
    "n": "i32/16",
    "k": "i32/16",
    "tile_words": "i32/16",
    "out_stride": "i32/16",
    "out_offset": "i32/16",
    "words1": "i64/16",
    "n1": "i32/16",
    "stride1": "i32/16",
    "offset1": "i32/16",
    "words2": "i64/16",
    "n2": "i32/16",
    "stride2": "i32/16",
    "offset2": "i32/16",
}

# Of matrices with few outputs, any number of them.
_ANY = ("n", "out_stride", "out_offset", "n1", "stride1", "offset1", "n2", "stride2", "offset2")
NARROW_TYPES = {**TYPES, "out": "*fp32/4", **dict.fromkeys(_ANY, "i32")}

PAIR_TYPES = {
    "out": "*bf16",
    "x": "*bf16",
    "codes": "*i32",
    "scales": "*fp16",
    "rows": "i32",
    "n": "i32/16",
    "k": "i32/16",
    "tile_words": "i32/16",
    "up_words": "i64/16",
}


@triton.jit
def project(
    out,
    x,
    codes,
    scales,
    row_gate,
    rows,
    n,
    k,
    tile_words,
    out_stride,
    out_offset,
    words1,
    n1,
    stride1,
    offset1,
    words2,
    n2,
    stride2,
    offset2,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):
    """out[row, out_offset + i] = x[row] W_i, or is added to with RESIDUAL, gated with GATED.

    Up to three matrices of one format and as many inputs, in one launch: the second lies `words1`
    words behind the first, has n1 outputs, perhaps none, and a stride and an offset of its own in
    `out`; the third alike. Grid (blocks of BN outputs of all of them * blocks of BM rows), outputs
    fastest, so that the rows of a block stay in cache for the next.

    Args:
        out: [rows, out_stride], any float type; fp32 [rows, n] residual stream with RESIDUAL.
        x: bf16 [rows, k] in fragment order.
        codes: Tiles of 16 outputs, `tile_words` apart; the first begins at `scales`.
        row_gate: fp32 [rows]; read with GATED only.
    """
    follow()
    blocks0 = tl.cdiv(n, BN)
    blocks1 = blocks0 + tl.cdiv(n1, BN)
    blocks = blocks1 + tl.cdiv(n2, BN)
    block = tl.program_id(0)
    row = block // blocks * BM + tl.arange(0, BM)
    inside = row < rows
    block %= blocks
    words = words1 * 0
    if block >= blocks1:
        block -= blocks1
        words, n, out_stride, out_offset = words2, n2, stride2, offset2
    elif block >= blocks0:
        block -= blocks0
        words, n, out_stride, out_offset = words1, n1, stride1, offset1
    first = block * BN
    tile = tl.minimum(first // 16 + tl.arange(0, BN // 16), (n - 1) // 16)
    total = multiply(
        codes,
        scales,
        tile.to(tl.int64) * tile_words + words,
        x,
        row.to(tl.int64) * k,
        inside,
        k,
        BITS,
        GROUP,
        STEP,
        BN,
        BM,
    )
    total = tl.trans(total)
    column = first + tl.arange(0, BN)
    to = out + (row.to(tl.int64) * out_stride + out_offset)[:, None] + column[None, :]
    mask = inside[:, None] & (column < n)[None, :]
    if RESIDUAL:
        if GATED:
            total *= tl.sigmoid(tl.load(row_gate + row, mask=inside, other=0.0))[:, None]
        total += tl.load(to, mask=mask, other=0.0)
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def project_pair(
    out,
    x,
    codes,
    scales,
    rows,
    n,
    k,
    tile_words,
    up_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out = silu(x G^T) * (x U^T) in fragment order: the gate and up of the shared expert.

    Grid (blocks of BN outputs * blocks of BM rows). G and U are of one shape; U lies `up_words`
    words behind G. A product of 2 BN outputs takes both.

    Args:
        out: bf16 [rows, n], n a multiple of BN.
        x: bf16 [rows, k] in fragment order.
    """
    follow()
    blocks = n // BN
    block = tl.program_id(0)
    first = block % blocks * BN
    row = block // blocks * BM + tl.arange(0, BM)
    inside = row < rows
    half: tl.constexpr = BN // 16
    index = tl.arange(0, 2 * half)
    tile = (first // 16 + index % half).to(tl.int64) * tile_words + index // half * up_words
    total = multiply(
        codes,
        scales,
        tile,
        x,
        row.to(tl.int64) * k,
        inside,
        k,
        BITS,
        GROUP,
        STEP,
        2 * BN,
        BM,
    )
    value = silu_times(total, BN, BM)
    column = first + tl.arange(0, BN)
    to = out + (row.to(tl.int64) * n)[:, None] + column[None, :]
    tl.store(to, value, mask=inside[:, None])


@triton.jit
def silu_times(total, BN: tl.constexpr, BM: tl.constexpr):
    """[2 BN outputs, BM rows], gates first -> bf16 [BM, BN] silu(gate) * up in fragment order."""
    gate, up = tl.split(tl.permute(tl.reshape(total, (2, BN, BM)), (2, 1, 0)))
    value = gate * tl.sigmoid(gate) * up
    return fragment_order(value.to(tl.bfloat16), BM, BN)
