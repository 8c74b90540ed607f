"""Before attention: norm and RoPE of queries and keys; new keys and values to their pages.

A page holds 64 tokens of one layer: keys [kv heads, 64, DIM], then values alike.
"""

import triton
import triton.language as tl

from .interpreted import follow

PAGE = tl.constexpr(64)

TYPES = {
    "q": "*bf16",
    "kv": "*bf16",
    "proj": "*bf16",
    "q_norm": "*fp32",
    "k_norm": "*fp32",
    "frequency": "*fp32",
    "pages": "*i32/4",
    "rows": "i32",
    "start": "i32",
    "proj_stride": "i32/16",
    "page_stride": "i64/16",
    "heads": "i32",
    "kv_heads": "i32",
    "half": "i32/16",
    "eps": "fp32",
    "scale": "fp32",
}


@triton.jit
def attention_append(
    q,
    kv,
    proj,
    q_norm,
    k_norm,
    frequency,
    pages,
    rows,
    start,
    proj_stride,
    page_stride,
    heads,
    kv_heads,
    half,
    eps,
    scale,
    BT: tl.constexpr,
    DIM: tl.constexpr,
):
    """Grid (heads + 2 kv_heads, blocks of BT rows): query heads, then keys, then values.

    Args:
        q: bf16 [rows, heads, DIM], normed, rotated, times `scale`.
        kv: bf16, page p at p * page_stride.
        proj: [rows, proj_stride]: per head q [DIM] and gate [DIM], then keys, then values.
        q_norm: fp32 [DIM], 1 + w; `k_norm` alike.
        frequency: fp32 [half], of the first 2 * half dimensions, which are rotated.
        pages: int32, of the session from its first token on.
        start: Position of the first row.
    """
    follow()
    head = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    dim = tl.arange(0, DIM)
    inside = row < rows
    is_query = head < heads
    column = tl.where(is_query, 2 * head * DIM, (heads + head) * DIM)
    from_row = proj + row.to(tl.int64)[:, None] * proj_stride + column
    mask = inside[:, None]
    x = tl.load(from_row + dim[None, :], mask=mask, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        weight = q_norm
        if not is_query:
            weight = k_norm
        # The dimension that a dimension is rotated with, and the sign of its part.
        first = dim < half
        turned = dim < 2 * half
        other = tl.where(first, dim + half, tl.where(turned, dim - half, dim))
        y = tl.load(from_row + other[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = x * factor * tl.load(weight + dim)[None, :]
        y = y * factor * tl.load(weight + other)[None, :]
        place = tl.where(first, dim, other)
        angle = (start + row).to(tl.float32)[:, None] * tl.load(
            frequency + place, mask=turned, other=0.0
        )
        y = tl.where(first[None, :], -y, y) * tl.sin(angle)
        x = tl.where(turned[None, :], x * tl.cos(angle) + y, x)
    if is_query:
        to = q + row.to(tl.int64)[:, None] * (heads * DIM) + head * DIM + dim[None, :]
        tl.store(to, (x * scale).to(tl.bfloat16), mask=mask)
    else:
        position = start + row
        page = tl.load(pages + position // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * page_stride + ((head - heads) * PAGE + position % PAGE) * DIM
        tl.store(kv + at[:, None] + dim[None, :], x.to(tl.bfloat16), mask=mask)
