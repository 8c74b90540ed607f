"""What the prefill kernels must compute, in plain torch, and weights in their device form.

Used by the tests on the CPU and by benchmarks/bench_prefill_kernels.py on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

CHUNK = 64


def fragment_places(columns: int) -> torch.Tensor:
    """Input at every place of fragment order (kernels/tiles.py)."""
    place = torch.arange(32)
    s, r, t, h = place // 16, place // 8 % 2, place // 2 % 4, place % 2
    inputs = 8 * t + 4 * s + 2 * r + h
    return (torch.arange(columns // 32)[:, None] * 32 + inputs).reshape(-1)


def to_fragment_order(x: torch.Tensor) -> torch.Tensor:
    return x[..., fragment_places(x.shape[-1]).to(x.device)].contiguous()


def from_fragment_order(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[..., fragment_places(x.shape[-1]).to(x.device)] = x
    return out


@dataclass
class Packed:
    """Matrices of one shape in the form of csrc/cuda/tile.cuh."""

    data: torch.Tensor  # uint8 [count, tiles, tile_bytes]
    dense: torch.Tensor  # fp32 [count, n, k], what the codes mean
    bits: int
    group: int

    @property
    def n(self) -> int:
        return self.dense.shape[1]

    @property
    def k(self) -> int:
        return self.dense.shape[2]

    @property
    def tile_words(self) -> int:
        return self.data.shape[2] // 4

    @property
    def scale_bytes(self) -> int:
        return 0 if self.bits == 16 else (self.k // self.group * 32 + 63) // 64 * 64

    @property
    def codes(self) -> torch.Tensor:
        return self.data.view(-1)[self.scale_bytes :].view(torch.int32)

    @property
    def scales(self) -> torch.Tensor:
        return self.data.view(-1).view(torch.float16)


def pack(codes: torch.Tensor, scales: torch.Tensor | None, bits: int, group: int) -> Packed:
    """Signed codes [count, n, k] (bf16 values for 16 bits), fp16 scales [count, n, k / group]."""
    count, n, k = codes.shape
    tiles = (n + 15) // 16
    if scales is None:
        dense = codes.float()
    else:
        dense = codes.float() * scales.float().repeat_interleave(group, dim=-1)
    padded = F.pad(codes, (0, 0, 0, tiles * 16 - n))
    # tile, o, q | unit, j, t, r2, r1, h: output 8 o + q, input 32 j + 8 t + 4 r2 + 2 r1 + h
    c = padded.reshape(count, tiles, 2, 8, k // 64, 2, 4, 2, 2, 2)
    if bits == 4:
        c = c.permute(0, 1, 4, 3, 6, 5, 7, 9, 8, 2).reshape(count, tiles, -1, 8) + 8
        shifts = torch.arange(0, 32, 4, device=c.device)
        words = (c.long() << shifts).sum(-1).to(torch.int32)
        body = words.view(torch.uint8).reshape(count, tiles, -1)
    elif bits == 8:
        c = c.permute(0, 1, 4, 5, 3, 6, 7, 8, 2, 9)
        body = (c.to(torch.int16) + 128).to(torch.uint8).reshape(count, tiles, -1)
    else:
        c = c.permute(0, 1, 4, 5, 7, 3, 6, 8, 2, 9).to(torch.bfloat16).contiguous()
        body = c.view(torch.uint8).reshape(count, tiles, -1)
    if scales is not None:
        s = F.pad(scales, (0, 0, 0, tiles * 16 - n)).reshape(count, tiles, 16, k // group)
        s = s.transpose(2, 3).to(torch.float16).contiguous()
        s = s.view(torch.uint8).reshape(count, tiles, -1)
        body = torch.cat([F.pad(s, (0, -s.shape[-1] % 64)), body], dim=-1)
    return Packed(body.contiguous(), dense, bits, group)


def random_weight(count: int, n: int, k: int, bits: int, group: int, device: str = "cpu") -> Packed:
    """About as large as keeps the sums of unit activations near one."""
    if bits == 16:
        return pack(
            (torch.randn(count, n, k, device=device) * k**-0.5).to(torch.bfloat16), None, 16, 0
        )
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (count, n, k), dtype=torch.int8, device=device)
    spread = 0.5 + torch.rand(count, n, k // group, device=device)
    return pack(codes, (spread * 1.7 / top * k**-0.5).to(torch.float16), bits, group)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def conv_silu_norm(
    x: torch.Tensor, window: torch.Tensor, taps: torch.Tensor, key_dim: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, channels], window [3, channels], taps [4, channels] -> q | k | v, next window."""
    past = torch.cat([window, x])
    y = sum(taps[j] * past[j : j + len(x)] for j in range(4))
    y = F.silu(y)
    heads = y[:, : 2 * key_dim].reshape(len(x), -1, dim)
    heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)
    heads[:, : key_dim // dim] *= dim**-0.5
    return torch.cat([heads.reshape(len(x), -1), y[:, 2 * key_dim :]], dim=1), past[-3:]


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence, token by token (Yang et al., Gated Delta Networks, 2024).

    q, k, v [T, heads, dim], log_decay and beta [T, heads], state [heads, key dim, value dim].
    """
    out = torch.empty_like(v)
    for t in range(len(q)):
        state = state * log_decay[t].exp()[:, None, None]
        error = v[t] - torch.einsum("hkv,hk->hv", state, k[t])
        state = state + torch.einsum("hk,hv->hkv", k[t], beta[t][:, None] * error)
        out[t] = torch.einsum("hkv,hk->hv", state, q[t])
    return out, state


def rotate(x: torch.Tensor, position: torch.Tensor, frequency: torch.Tensor) -> torch.Tensor:
    """RoPE on the halves of the first 2 * len(frequency) dimensions of [T, heads, dim]."""
    half = len(frequency)
    angle = (position.float()[:, None] * frequency)[:, None]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
    """Causal: query t [T, heads, dim] sees keys [length, kv heads, dim] up to start + t."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("thd,shd->hts", q, k)
    seen = torch.arange(len(k), device=q.device) <= start + torch.arange(
        len(q), device=q.device
    ).unsqueeze(1)
    weight = score.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weight, v)


def top_experts(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and renormalised weights, ties to the lowest index."""
    order = torch.sort(logits, dim=-1, descending=True, stable=True)
    ids = order.indices[:, :top_k]
    return ids.int(), order.values[:, :top_k].softmax(-1)


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Sum over ranks of weight * down(silu(gate x) * up x); activations round to bf16 between."""
    out = torch.zeros(len(x), down.shape[1], device=x.device)
    for e in ids.unique().tolist():
        token, rank = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        act = (F.silu(gate) * up).to(torch.bfloat16).float()
        part = act @ down[e].T
        out.index_add_(0, token, part * weights[token, rank][:, None])
    return out
