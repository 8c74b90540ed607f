"""First part of the chunked gated delta rule: what a chunk can work out without the state.

Per head and token, with decay e^g and step size b (Yang et al., "Gated Delta Networks", 2024; the
chunked form after "Parallelizing Linear Transformers with the Delta Rule", 2024):
S = e^g S;  u = b (v - S^T k);  S = S + k u^T;  o = S^T q.
A chunk of 64 tokens, G the running sum of g inside it, S the state before it:
    A_ij = b_i e^(G_i - G_j) k_i.k_j for j < i      T = (I + A)^-1
    W = T (b e^G K)    U' = T (b V)                 U = U' - W S
    O = e^G Q S + P U, P_ij = e^(G_i - G_j) q_i.k_j for j <= i
    S' = e^(G_64) S + (e^(G_64 - G) K)^T U
This kernel makes T, W, U' and G; delta_scan.py makes U and S chunk after chunk; delta_output.py O.
Rows that a chunk lacks at its begin or end have k = v = b = g = 0 and change nothing.
"""

import triton
import triton.language as tl

from .interpreted import INTERPRETED, dot, follow

CHUNK = tl.constexpr(64)

TYPES = {
    "w": "*bf16",
    "u": "*bf16",
    "sums": "*fp32",
    "qkv": "*bf16",
    "gates": "*fp32",
    "decay_rate": "*fp32",
    "dt_bias": "*fp32",
    "rows": "i32",
    "offset": "i32",
    "channels": "i32/16",
    "gates_stride": "i32",
    "key_heads": "i32",
    "heads": "i32",
}


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """A b of fp32 matrices."""
    if INTERPRETED:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def invert_blocks(a):
    """(I + A)^-1 of the 16 x 16 diagonal blocks of a strictly lower A [64, 64], zero elsewhere.

    Forward substitution, row by row in all four blocks at once: the powers of A that a product form
    needs grow where keys repeat.
    """
    block = tl.arange(0, 4)
    same = block[:, None, None, None] == block[None, None, :, None]
    d = tl.sum(tl.where(same, tl.reshape(a, (4, 16, 4, 16)), 0.0), axis=2)  # [4, 16, 16]
    row = tl.arange(0, 16)
    inverse = tl.where(row[:, None] == row[None, :], 1.0, 0.0)[None, :, :]
    inverse = tl.broadcast_to(inverse, (4, 16, 16))
    for i in range(1, 16):
        here = (row == i)[None, :, None]
        factor = tl.sum(tl.where(here, d, 0.0), axis=1)  # row i of A: [4, 16]
        known = tl.sum(factor[:, :, None] * inverse, axis=1)
        inverse = tl.where(here, inverse - known[:, None, :], inverse)
    spread = tl.where(same, inverse[:, :, None, :], 0.0)
    return tl.reshape(spread, (64, 64))


@triton.jit
def invert(a, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower A [64, 64].

    With D the inverse of the diagonal blocks, N the rest of A and X = D N: (I + X)^-1 D, and
    X^4 = 0, so that (I + X)^-1 = (I - X)(I + X^2).
    """
    block = tl.arange(0, 64) // 16
    d = invert_blocks(a)
    x = product(d, tl.where(block[:, None] > block[None, :], a, 0.0), PRECISION)
    y = d + product(product(x, x, PRECISION), d, PRECISION)
    return y - product(x, y, PRECISION)


@triton.jit
def delta_prepare(
    w,
    u,
    sums,
    qkv,
    gates,
    decay_rate,
    dt_bias,
    rows,
    offset,
    channels,
    gates_stride,
    key_heads,
    heads,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W, U' and G of every chunk. Grid (heads, chunks).

    Args:
        w: bf16 [chunks, heads, 64, DIM]; `u` alike.
        sums: fp32 [chunks, heads, 64], G.
        qkv: bf16 [rows, channels] of `conv_silu_norm`.
        gates: fp32 [rows, gates_stride], b of all heads, then a; their values before the gate.
        decay_rate: fp32 [heads], -exp(A_log).
        dt_bias: fp32 [heads].
        rows: Tokens.
        offset: Of the first token in its chunk.
    """
    follow()
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    i = tl.arange(0, CHUNK)
    row = chunk * CHUNK + i - offset
    inside = (row >= 0) & (row < rows)
    dim = tl.arange(0, DIM)

    gate = gates + row.to(tl.int64) * gates_stride + head
    beta = tl.where(inside, tl.sigmoid(tl.load(gate, mask=inside, other=0.0)), 0.0)
    step = tl.load(gate + heads, mask=inside, other=0.0) + tl.load(dt_bias + head)
    step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))
    log_decay = tl.where(inside, tl.load(decay_rate + head) * step, 0.0)
    total = tl.cumsum(log_decay, axis=0)
    at = (chunk * heads + head).to(tl.int64) * CHUNK
    tl.store(sums + at + i, total)

    from_row = qkv + row.to(tl.int64)[:, None] * channels + dim[None, :]
    key_head = head // (heads // key_heads)
    k = tl.load(from_row + (key_heads + key_head) * DIM, mask=inside[:, None], other=0.0)
    v = tl.load(from_row + (2 * key_heads + head) * DIM, mask=inside[:, None], other=0.0)

    before = i[:, None] > i[None, :]
    decay = tl.exp(tl.where(before, total[:, None] - total[None, :], 0.0))
    a = tl.where(before, beta[:, None] * decay * dot(k, tl.trans(k)), 0.0)
    t = invert(a, PRECISION).to(tl.bfloat16)

    to = (at + i)[:, None] * DIM + dim[None, :]
    scaled = (k.to(tl.float32) * (beta * tl.exp(total))[:, None]).to(tl.bfloat16)
    tl.store(w + to, dot(t, scaled).to(tl.bfloat16))
    scaled = (v.to(tl.float32) * beta[:, None]).to(tl.bfloat16)
    tl.store(u + to, dot(t, scaled).to(tl.bfloat16))
