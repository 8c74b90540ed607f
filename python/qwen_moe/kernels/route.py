"""Which experts take which tokens: top-k, a stable counting sort by expert, and the blocks of work.

Three kernels and no atomics: blocks of tokens count their picks, one block adds the counts up, and
every pick then knows its place.
"""

import triton
import triton.language as tl

from .interpreted import follow

TOP_TYPES = {
    "ids": "*i32",
    "weights": "*fp32",
    "ranks": "*i32",
    "counts": "*i32",
    "logits": "*fp32",
    "rows": "i32",
    "experts": "i32",
    "top_k": "i32",
}

PLAN_TYPES = {
    "places": "*i32",
    "work": "*i32",
    "counts": "*i32",
    "blocks": "i32",
    "experts": "i32",
    "block_rows": "i32",
}

SORT_TYPES = {
    "order": "*i32",
    "ids": "*i32",
    "ranks": "*i32",
    "places": "*i32",
    "picks": "i32",
    "experts": "i32",
    "block_picks": "i32",
}


@triton.jit
def top_experts(
    ids,
    weights,
    ranks,
    counts,
    logits,
    rows,
    experts,
    top_k,
    BT: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP: tl.constexpr,
):
    """The likeliest experts of every token, ties to the lowest index. Grid (blocks of BT tokens).

    Args:
        ids: int32 [rows, top_k], likeliest first.
        weights: fp32 [rows, top_k], softmax over the picks.
        ranks: int32 [rows, top_k], earlier tokens of the block that pick the same expert.
        counts: int32 [blocks, experts].
        logits: fp32 [rows, experts], experts <= EXPERTS.
    """
    follow()
    block = tl.program_id(0)
    row = block * BT + tl.arange(0, BT)
    expert = tl.arange(0, EXPERTS)
    there = (row < rows)[:, None] & (expert < experts)[None, :]
    left = tl.load(
        logits + row.to(tl.int64)[:, None] * experts + expert[None, :],
        mask=there,
        other=float("-inf"),
    )
    # Above that of an expert that is taken or not there, NaN included: no expert is taken twice.
    least: tl.constexpr = -3.0e38
    left = tl.where(there, tl.where(left > least, left, least), left)
    slot = tl.arange(0, TOP)
    picked = tl.zeros((BT, EXPERTS), tl.int32)
    id_of = tl.zeros((BT, TOP), tl.int32)
    value_of = tl.full((BT, TOP), float("-inf"), tl.float32)
    for rank in range(top_k):
        best, at = tl.max(left, axis=1, return_indices=True, return_indices_tie_break_left=True)
        here = expert[None, :] == at[:, None]
        picked += here.to(tl.int32)
        left = tl.where(here, float("-inf"), left)
        mine = (slot == rank)[None, :]
        id_of = tl.where(mine, at.to(tl.int32)[:, None], id_of)
        value_of = tl.where(mine, best[:, None], value_of)
    # The first is the largest. Rows beyond the last have no finite one, and are not written.
    largest = tl.max(value_of, axis=1)
    share = tl.exp(value_of - tl.where(largest == float("-inf"), 0.0, largest)[:, None])
    share /= tl.maximum(tl.sum(share, axis=1), 1e-30)[:, None]
    to = row[:, None] * top_k + slot[None, :]
    inside = (row < rows)[:, None] & (slot < top_k)[None, :]
    tl.store(ids + to, id_of, mask=inside)
    tl.store(weights + to, share, mask=inside)

    picked = tl.where((row < rows)[:, None], picked, 0)
    before = tl.cumsum(picked, axis=0) - picked
    for rank in range(top_k):
        at = tl.sum(tl.where((slot == rank)[None, :], id_of, 0), axis=1)
        earlier = tl.sum(tl.where(expert[None, :] == at[:, None], before, 0), axis=1)
        tl.store(ranks + row * top_k + rank, earlier, mask=row < rows)
    tl.store(counts + block * experts + expert, tl.sum(picked, axis=0), mask=expert < experts)


@triton.jit
def plan_experts(
    places,
    work,
    counts,
    blocks,
    experts,
    block_rows,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Where the picks of every block of tokens begin, and the blocks of work. Grid (1).

    Args:
        places: int32 [blocks, experts], the first place of a block's picks in the order by expert.
        work: int32 [1 + 3 * blocks of work]: how many there are, then of each its expert, its first
            place, and the place behind the expert's last.
        counts: int32 [blocks, experts].
        block_rows: Picks that one block of work takes.
    """
    follow()
    expert = tl.arange(0, EXPERTS)
    inside = (expert < experts)[None, :]
    total = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * experts + expert[None, :]
        count = tl.load(counts + at, mask=(block < blocks)[:, None] & inside, other=0)
        total += tl.sum(count, axis=0)
    begin = tl.cumsum(total, axis=0) - total
    place = begin
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * experts + expert[None, :]
        there = (block < blocks)[:, None] & inside
        count = tl.load(counts + at, mask=there, other=0)
        tl.store(places + at, place[None, :] + tl.cumsum(count, axis=0) - count, mask=there)
        place += tl.sum(count, axis=0)

    pieces = (total + block_rows - 1) // block_rows
    index = tl.cumsum(pieces, axis=0) - pieces
    tl.store(work, tl.sum(pieces, axis=0))
    for piece in range(tl.max(pieces, axis=0)):
        to = work + 1 + (index + piece) * 3
        tl.store(to, expert, mask=piece < pieces)
        tl.store(to + 1, begin + piece * block_rows, mask=piece < pieces)
        tl.store(to + 2, begin + total, mask=piece < pieces)


@triton.jit
def sort_picks(order, ids, ranks, places, picks, experts, block_picks, BLOCK: tl.constexpr):
    """order[place] = pick (token * top_k + rank), by expert, then by token. Grid (picks / BLOCK).

    Args:
        block_picks: Picks of a block of `top_experts`, BT * top_k.
    """
    follow()
    pick = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pick < picks
    expert = tl.load(ids + pick, mask=inside, other=0)
    at = pick // block_picks * experts + expert
    place = tl.load(places + at, mask=inside, other=0)
    place += tl.load(ranks + pick, mask=inside, other=0)
    tl.store(order + place, pick, mask=inside)
