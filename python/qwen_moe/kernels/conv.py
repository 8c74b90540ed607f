"""Causal convolution over four tokens, SiLU, and the L2 norm of query and key heads."""

import triton
import triton.language as tl

from .interpreted import follow

TYPES = {
    "out": "*bf16",
    "proj": "*bf16",
    "window": "*fp32",
    "taps": "*fp32",
    "rows": "i32",
    "proj_stride": "i32/16",
    "channels": "i32/16",
    "key_heads": "i32",
    "query_scale": "fp32",
}

WINDOW_TYPES = {
    "window": "*fp32",
    "proj": "*bf16",
    "rows": "i32",
    "proj_stride": "i32/16",
    "channels": "i32/16",
}


@triton.jit
def conv_silu_norm(
    out,
    proj,
    window,
    taps,
    rows,
    proj_stride,
    channels,
    key_heads,
    query_scale,
    BT: tl.constexpr,
    DIM: tl.constexpr,
):
    """Out = silu(conv(proj)), and q and k heads divided by sqrt(sum of squares + 1e-6).

    Grid (channels / DIM heads, blocks of BT rows); the heads are q, k (key_heads each), then v.

    Args:
        out: bf16 [rows, channels].
        proj: [rows, proj_stride], q | k | v first.
        window: fp32 [3, channels], what came before the first row, oldest first.
        taps: fp32 [4, channels], oldest first.
        query_scale: Factor of the q heads.
    """
    follow()
    head = tl.program_id(0)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    channel = head * DIM + tl.arange(0, DIM)
    y = tl.zeros((BT, DIM), tl.float32)
    for j in tl.static_range(4):
        at = row + (j - 3)
        now = tl.load(
            proj + at.to(tl.int64)[:, None] * proj_stride + channel[None, :],
            mask=((at >= 0) & (at < rows))[:, None],
            other=0.0,
        )
        before = tl.load(
            window + (at + 3)[:, None] * channels + channel[None, :],
            mask=(at < 0)[:, None],
            other=0.0,
        )
        y += (now.to(tl.float32) + before) * tl.load(taps + j * channels + channel)[None, :]
    y *= tl.sigmoid(y)
    if head < 2 * key_heads:
        scale = tl.rsqrt(tl.sum(y * y, axis=1) + 1e-6)
        scale = tl.where(head < key_heads, scale * query_scale, scale)
        y *= scale[:, None]
    to = out + row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(to, y.to(tl.bfloat16), mask=(row < rows)[:, None])


@triton.jit
def conv_window(window, proj, rows, proj_stride, channels, BLOCK: tl.constexpr):
    """The window after these rows: the last three inputs. Grid (blocks of channels).

    A kernel of its own: every block of `conv_silu_norm` may read the window.
    """
    follow()
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    a = _input(window, proj, rows - 3, proj_stride, channels, channel, inside)
    b = _input(window, proj, rows - 2, proj_stride, channels, channel, inside)
    c = _input(window, proj, rows - 1, proj_stride, channels, channel, inside)
    tl.debug_barrier()  # a short step reads what it shifts: all of it before anything is written
    tl.store(window + channel, a, mask=inside)
    tl.store(window + channels + channel, b, mask=inside)
    tl.store(window + 2 * channels + channel, c, mask=inside)


@triton.jit
def _input(window, proj, row, proj_stride, channels, channel, inside):
    """Input of the convolution at a row, which may lie in the window."""
    at = tl.zeros_like(channel) + row
    now = tl.load(
        proj + at.to(tl.int64) * proj_stride + channel, mask=inside & (at >= 0), other=0.0
    )
    before = tl.load(window + (at + 3) * channels + channel, mask=inside & (at < 0), other=0.0)
    return now.to(tl.float32) + before
