"""Causal grouped-query attention over paged keys and values, with a running maximum.

After "FlashAttention" (Dao et al., 2022): one pass over the keys, sums rescaled as the maximum
grows. A block takes all query heads of one kv head for a few tokens, so every page is read once for
them. Keys are visited from the first one, so a row's bits depend on its own position alone: keys
that a row does not see add nothing and change nothing.
"""

import triton
import triton.language as tl

from .interpreted import dot, dot_add, follow
from .tiles import fragment_order

PAGE = tl.constexpr(64)
LOG2_E = tl.constexpr(1.4426950408889634)

TYPES = {
    "core": "*bf16",
    "q": "*bf16",
    "kv": "*bf16",
    "proj": "*bf16",
    "pages": "*i32/4",
    "rows": "i32",
    "start": "i32",
    "proj_stride": "i32/16",
    "page_stride": "i64/16",
    "heads": "i32",
    "kv_heads": "i32",
}


@triton.jit
def _visit(
    queries,
    out,
    top,
    total,
    keys,
    values,
    at,
    position,
    last,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the keys and values [BN, DIM] of the tokens from `at` on."""
    token = at + tl.arange(0, BN)
    if MASKED:
        # What lies behind the last token may be NaN, and 0 * NaN would count.
        there = (token <= last)[:, None]
        k = tl.load(keys, mask=there, other=0.0)
        v = tl.load(values, mask=there, other=0.0)
    else:
        k = tl.load(keys)
        v = tl.load(values)
    score = dot(queries, tl.trans(k)) * LOG2_E
    if MASKED:
        score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
    higher = tl.maximum(top, tl.max(score, axis=1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(score - higher[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    out = dot_add(p.to(tl.bfloat16), v, out * shrink[:, None])
    return out, higher, total


@triton.jit
def attention(
    core,
    q,
    kv,
    proj,
    pages,
    rows,
    start,
    proj_stride,
    page_stride,
    heads,
    kv_heads,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DIM: tl.constexpr,
):
    """Core = softmax(q k^T) v * sigmoid(gate) in fragment order.

    Grid (kv_heads, blocks of BM / (heads / kv_heads) tokens), the last tokens first, as they have
    the most to do.

    Args:
        core: bf16 [rows, heads * DIM].
        q: bf16 [rows, heads, DIM], scaled.
        kv: bf16, page p at p * page_stride: keys [kv_heads, 64, DIM], then values.
        proj: [rows, proj_stride], the gate of head h at (2 h + 1) * DIM.
        pages: int32, of the session from its first token on.
        start: Position of the first row.
    """
    follow()
    kv_head = tl.program_id(0)
    group = heads // kv_heads
    tokens = BM // group
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * tokens
    i = tl.arange(0, BM)
    row = first + i // group
    head = kv_head * group + i % group
    inside = ((i < tokens * group) & (row < rows))[:, None]
    dim = tl.arange(0, DIM)
    column = head[:, None] * DIM + dim[None, :]
    at_row = row.to(tl.int64)[:, None]
    queries = tl.load(q + at_row * (heads * DIM) + column, mask=inside, other=0.0)

    position = start + row
    last = start + tl.minimum(first + tokens, rows) - 1
    keys = kv + kv_head * (PAGE * DIM) + tl.arange(0, BN)[:, None] * DIM + dim[None, :]
    to_values = kv_heads * (PAGE * DIM)
    out = tl.zeros((BM, DIM), tl.float32)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    # Tokens that every row of the block sees, BN at a time, then those that some rows see.
    whole = (start + first + 1) // BN
    final = last // BN
    # The page of a step is known one step ahead; a page holds 64.
    number = tl.load(pages)
    for step in range(whole):
        k = keys + number.to(tl.int64) * page_stride + step * BN % 64 * DIM
        number = tl.load(pages + tl.minimum(step + 1, final) * BN // PAGE)
        out, top, total = _visit(
            queries, out, top, total, k, k + to_values, step * BN, position, last, BN, MASKED=False
        )
    for step in range(whole, final + 1):
        k = keys + number.to(tl.int64) * page_stride + step * BN % 64 * DIM
        number = tl.load(pages + tl.minimum(step + 1, final) * BN // PAGE)
        out, top, total = _visit(
            queries, out, top, total, k, k + to_values, step * BN, position, last, BN, MASKED=True
        )

    gate_column = column + (head[:, None] + 1) * DIM
    gate = tl.load(proj + at_row * proj_stride + gate_column, mask=inside, other=0.0)
    out = out / total[:, None] * tl.sigmoid(gate.to(tl.float32))
    out = fragment_order(out.to(tl.bfloat16), BM, DIM)
    tl.store(core + at_row * (heads * DIM) + column, out, mask=inside)
