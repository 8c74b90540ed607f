"""Routed experts: grouped products over picks sorted by expert, and their sum in order of rank.

A block of work is up to BM picks of one expert (route.py). A row of a product does not see the rows
beside it, so a token's bits do not depend on who shares its experts.
"""

import triton
import triton.language as tl

from .dense import silu_times
from .interpreted import follow
from .tiles import multiply

GATE_UP_TYPES = {
    "out": "*bf16",
    "x": "*bf16",
    "codes": "*i32",
    "scales": "*fp16",
    "order": "*i32",
    "work": "*i32",
    "n": "i32/16",
    "k": "i32/16",
    "tile_words": "i32/16",
    "top_k": "i32",
}

DOWN_TYPES = {
    "out": "*bf16",
    "x": "*bf16",
    "codes": "*i32",
    "scales": "*fp16",
    "order": "*i32",
    "work": "*i32",
    "n": "i32/16",
    "k": "i32/16",
    "tile_words": "i32/16",
}

COMBINE_TYPES = {
    "hidden": "*fp32",
    "parts": "*bf16",
    "weights": "*fp32",
    "columns": "i32/16",
    "top_k": "i32",
}


@triton.jit
def expert_gate_up(
    out,
    x,
    codes,
    scales,
    order,
    work,
    n,
    k,
    tile_words,
    top_k,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[place] = silu(x G^T) * (x U^T) of the pick at each place, in fragment order.

    Grid (n / BN * most blocks of work), outputs fastest; blocks beyond the last end at once.

    Args:
        out: bf16 [picks, n], in the order by expert.
        x: bf16 [tokens, k] in fragment order.
        codes: Experts of 2 n outputs, gates first; n is a multiple of BN.
        order: int32 [picks], pick at each place.
        work: As `plan_experts` leaves it.
    """
    follow()
    blocks = n // BN
    piece = tl.program_id(0) // blocks
    if piece >= tl.load(work):
        return
    expert = tl.load(work + 1 + piece * 3).to(tl.int64)
    place = tl.load(work + 2 + piece * 3) + tl.arange(0, BM)
    inside = place < tl.load(work + 3 + piece * 3)
    token = tl.load(order + place, mask=inside, other=0) // top_k
    first = tl.program_id(0) % blocks * BN
    half: tl.constexpr = BN // 16
    index = tl.arange(0, 2 * half)
    tile = first // 16 + index % half + index // half * (n // 16)
    total = multiply(
        codes,
        scales,
        (expert * (n // 8) + tile) * tile_words,
        x,
        token.to(tl.int64) * k,
        inside,
        k,
        BITS,
        GROUP,
        STEP,
        2 * BN,
        BM,
    )
    column = first + tl.arange(0, BN)
    to = out + place.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(to, silu_times(total, BN, BM), mask=inside[:, None])


@triton.jit
def expert_down(
    out,
    x,
    codes,
    scales,
    order,
    work,
    n,
    k,
    tile_words,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out[pick] = x[place] D^T. Grid (n / BN * most blocks of work), outputs fastest.

    Args:
        out: bf16 or fp32 [picks, n], by token and rank; n is a multiple of BN.
        x: bf16 [picks, k] in fragment order, in the order by expert.
    """
    follow()
    blocks = n // BN
    piece = tl.program_id(0) // blocks
    if piece >= tl.load(work):
        return
    expert = tl.load(work + 1 + piece * 3).to(tl.int64)
    place = tl.load(work + 2 + piece * 3) + tl.arange(0, BM)
    inside = place < tl.load(work + 3 + piece * 3)
    pick = tl.load(order + place, mask=inside, other=0)
    first = tl.program_id(0) % blocks * BN
    tile = first // 16 + tl.arange(0, BN // 16)
    total = multiply(
        codes,
        scales,
        (expert * (n // 16) + tile) * tile_words,
        x,
        place.to(tl.int64) * k,
        inside,
        k,
        BITS,
        GROUP,
        STEP,
        BN,
        BM,
    )
    column = first + tl.arange(0, BN)
    to = out + pick.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(to, tl.trans(total).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def combine_experts(hidden, parts, weights, columns, top_k, BLOCK: tl.constexpr):
    """Hidden += sum over ranks, in order, of weight * part. Grid (blocks of columns, tokens).

    Args:
        hidden: fp32 [tokens, columns].
        parts: bf16 or fp32 [tokens, top_k, columns].
        weights: fp32 [tokens, top_k].
    """
    follow()
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(top_k):
        pick = (token * top_k + rank).to(tl.int64)
        part = tl.load(parts + pick * columns + column, mask=inside, other=0.0)
        total += tl.load(weights + pick) * part.to(tl.float32)
    to = hidden + token.to(tl.int64) * columns + column
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)
