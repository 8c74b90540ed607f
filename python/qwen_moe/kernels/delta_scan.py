"""Second part of the chunked gated delta rule (delta_prepare.py): the state, chunk after chunk.

Columns of the state never mix, so a head is split over blocks by value columns.
"""

import triton
import triton.language as tl

from .interpreted import dot, dot_add, follow

CHUNK = tl.constexpr(64)

TYPES = {
    "state": "*fp32",
    "states": "*bf16",
    "u": "*bf16",
    "w": "*bf16",
    "sums": "*fp32",
    "qkv": "*bf16",
    "rows": "i32",
    "offset": "i32",
    "channels": "i32/16",
    "key_heads": "i32",
    "heads": "i32",
}


@triton.jit
def delta_scan(
    state,
    states,
    u,
    w,
    sums,
    qkv,
    rows,
    offset,
    channels,
    key_heads,
    heads,
    DIM: tl.constexpr,
    BV: tl.constexpr,
):
    """Replaces U' by U, leaves the state before every chunk, and advances the state.

    Grid (DIM / BV, heads). The state is fp32; where it meets the tensor cores it is the sum of two
    bf16, so that a chunk loses no more of it than fp32 does.

    Args:
        state: fp32 [heads, DIM, DIM] (key, value), in and out.
        states: bf16 [chunks, heads, DIM, DIM].
        u: bf16 [chunks, heads, 64, DIM], U' in and U out; `w` alike.
        sums: fp32 [chunks, heads, 64].
        qkv: bf16 [rows, channels].
        rows: Tokens.
        offset: Of the first token in its chunk.
    """
    follow()
    head = tl.program_id(1)
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    dim = tl.arange(0, DIM)
    i = tl.arange(0, CHUNK)
    at_state = dim[:, None] * DIM + column[None, :]
    own = state + head.to(tl.int64) * (DIM * DIM) + at_state
    s = tl.load(own)
    key = qkv + (key_heads + head // (heads // key_heads)) * DIM + dim[:, None]

    for chunk in range(tl.cdiv(offset + rows, CHUNK)):
        at = (chunk * heads + head).to(tl.int64)
        row = chunk * CHUNK + i - offset
        inside = (row >= 0) & (row < rows)
        high = s.to(tl.bfloat16)
        low = (s - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(states + at * (DIM * DIM) + at_state, high)
        w_chunk = tl.load(w + (at * CHUNK + i)[:, None] * DIM + dim[None, :])
        u_ptr = u + (at * CHUNK + i)[:, None] * DIM + column[None, :]
        change = dot_add(w_chunk, low, dot(w_chunk, high))
        new = tl.load(u_ptr).to(tl.float32) - change
        tl.store(u_ptr, new.to(tl.bfloat16))
        total = tl.load(sums + at * CHUNK + i)
        last = tl.load(sums + at * CHUNK + CHUNK - 1)
        k = tl.load(key + row.to(tl.int64)[None, :] * channels, mask=inside[None, :], other=0.0)
        faded = (new * tl.exp(last - total)[:, None]).to(tl.bfloat16)
        s = dot_add(k, faded, s * tl.exp(last))
    tl.store(own, s)
