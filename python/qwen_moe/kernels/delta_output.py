"""Third part of the chunked gated delta rule (delta_prepare.py): outputs, normed and gated."""

import triton
import triton.language as tl

from .interpreted import dot, dot_add, follow
from .tiles import fragment_order

CHUNK = tl.constexpr(64)

TYPES = {
    "core": "*bf16",
    "states": "*bf16",
    "u": "*bf16",
    "sums": "*fp32",
    "qkv": "*bf16",
    "z": "*bf16",
    "norm": "*fp32",
    "rows": "i32",
    "offset": "i32",
    "channels": "i32/16",
    "z_stride": "i32/16",
    "key_heads": "i32",
    "heads": "i32",
    "eps": "fp32",
}


@triton.jit
def delta_output(
    core,
    states,
    u,
    sums,
    qkv,
    z,
    norm,
    rows,
    offset,
    channels,
    z_stride,
    key_heads,
    heads,
    eps,
    DIM: tl.constexpr,
):
    """Core = rms_norm(e^G Q S + P U) * silu(z) in fragment order. Grid (heads, chunks).

    Args:
        core: bf16 [rows, heads * DIM].
        states: bf16 [chunks, heads, DIM, DIM], before every chunk.
        u: bf16 [chunks, heads, 64, DIM].
        sums: fp32 [chunks, heads, 64].
        qkv: bf16 [rows, channels].
        z: [rows, z_stride], heads * DIM gates.
        norm: fp32 [DIM].
    """
    follow()
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    i = tl.arange(0, CHUNK)
    row = chunk * CHUNK + i - offset
    inside = ((row >= 0) & (row < rows))[:, None]
    dim = tl.arange(0, DIM)
    at = (chunk * heads + head).to(tl.int64)
    total = tl.load(sums + at * CHUNK + i)

    from_row = qkv + row.to(tl.int64)[:, None] * channels + dim[None, :]
    key_head = head // (heads // key_heads)
    q = tl.load(from_row + key_head * DIM, mask=inside, other=0.0)
    k = tl.load(from_row + (key_heads + key_head) * DIM, mask=inside, other=0.0)
    s = tl.load(states + at * (DIM * DIM) + dim[:, None] * DIM + dim[None, :])
    new = tl.load(u + (at * CHUNK + i)[:, None] * DIM + dim[None, :])

    seen = i[:, None] >= i[None, :]
    decay = tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0))
    p = tl.where(seen, dot(q, tl.trans(k)) * decay, 0.0).to(tl.bfloat16)
    o = dot_add(p, new, dot(q, s) * tl.exp(total)[:, None])

    o *= tl.rsqrt(tl.sum(o * o, axis=1) / DIM + eps)[:, None] * tl.load(norm + dim)[None, :]
    column = head * DIM + dim
    gate = tl.load(z + row.to(tl.int64)[:, None] * z_stride + column[None, :], mask=inside, other=0)
    gate = gate.to(tl.float32)
    o = fragment_order((o * gate * tl.sigmoid(gate)).to(tl.bfloat16), CHUNK, DIM)
    to = core + row.to(tl.int64)[:, None] * (heads * DIM) + column[None, :]
    tl.store(to, o, mask=inside)
