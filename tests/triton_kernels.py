"""Every prefill kernel against plain torch, in Triton's interpreter.

Not collected by itself: tests/test_kernels_triton.py runs it where TRITON_INTERPRET is set before
anything imports Triton.
"""

from __future__ import annotations

import pytest
import torch

import prefill_reference as ref
from qwen_moe.kernels import (
    attention,
    attention_append,
    conv,
    delta_output,
    delta_prepare,
    delta_scan,
    dense,
    moe,
    norm,
    route,
)

ROWS = [1, 2, 63, 64, 65, 129]
ROUNDED = 6e-3  # of values that are cut to bf16 once, as the interpreter does
FORMATS = [(4, 128), (4, 64), (8, 128), (16, 64)]
ALONE = (0, 0, 0, 0) * 2  # no second and no third matrix


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Root mean square of the difference, against that of what is expected."""
    got, expected = got.float(), expected.float()
    assert torch.isfinite(got).all()
    error = (got - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < relative, f"relative error {error:.2e}, allowed {relative:.0e}"


def bf16_rows(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).to(torch.bfloat16)


def blocks(count: int, size: int) -> int:
    return (count + size - 1) // size


def code_place(bits: int, o: int, k: int) -> tuple[int, bool]:
    """As in csrc/cuda/tile.cuh: the byte of a code, and whether it is the high nibble."""
    unit, inside = divmod(k, 64)
    j, t, r = inside // 32, inside % 32 // 8, inside % 8
    s, p, high = 2 * j + r // 4, o // 8 + r % 4 // 2 * 2, r % 2
    lane, base = o % 8 * 4 + t, unit * bits * 128
    if bits == 4:
        nibble = p + 4 * high
        return base + lane * 16 + s * 4 + nibble // 2, nibble % 2 == 1
    if bits == 8:
        return base + j * 512 + lane * 16 + r // 4 * 8 + p * 2 + high, False
    return base + s * 512 + lane * 16 + p * 4 + high * 2, False


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_packed_as_the_core_packs_them(bits: int) -> None:
    w = ref.random_weight(1, 32, 128, bits, 64)
    scale = w.scales[: w.tile_words * 2]
    for o, k in [(0, 0), (3, 1), (9, 7), (15, 64), (7, 127), (8, 37), (12, 90)]:
        byte, high = code_place(bits, o, k)
        code = int(w.data[0, 0, w.scale_bytes + byte])
        code = (code >> (4 * high) & 15) - 8 if bits == 4 else code - 128
        assert code * float(scale[k // 64 * 16 + o]) == w.dense[0, o, k]


@pytest.mark.parametrize("columns", [256, 192])
def test_rms_norm(columns: int) -> None:
    x, weight = torch.randn(5, columns) * 3, torch.rand(columns) + 0.5
    out = torch.empty(5, columns, dtype=torch.bfloat16)
    norm.rms_norm[(5,)](out, x, weight, columns, 1e-6, BLOCK=256)
    assert_close(ref.from_fragment_order(out), ref.rms_norm(x, weight, 1e-6), ROUNDED)


def rounding(bits: int, of: float = 1e-6) -> float:
    """Relative error of a product: scaled weights are cut to bf16, others have been it."""
    return of if bits == 16 else of + 8e-3


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("rows", [1, 65])
def test_projection(bits: int, group: int, rows: int) -> None:
    n, k = 72, 256
    w, x = ref.random_weight(1, n, k, bits, group), bf16_rows(rows, k)
    out = torch.zeros(rows, n + 8)
    gate = torch.empty(0)
    args = (ref.to_fragment_order(x), w.codes, w.scales, gate, rows, n, k, w.tile_words, n + 8, 8)
    shape = {"BITS": bits, "GROUP": group, "STEP": group, "BM": 16, "BN": 32}
    dense.project[(blocks(n, 32) * blocks(rows, 16),)](
        out, *args, *ALONE, **shape, RESIDUAL=False, GATED=False
    )
    assert_close(out[:, 8:], x.float() @ w.dense[0].T, rounding(bits))
    assert not out[:, :8].any()


@pytest.mark.parametrize("counts", [(64, 40, 0), (48, 1, 33), (16, 0, 72)])
def test_projection_by_several_matrices(counts: tuple[int, int, int]) -> None:
    rows, k, most = 20, 128, 96
    w, x = ref.random_weight(3, most, k, 8, 128), bf16_rows(rows, k)
    out, gate = torch.zeros(3 * rows * most), torch.empty(0)
    n, n1, n2 = counts
    apart = most // 16 * w.tile_words
    dense.project[(sum(blocks(count, 32) for count in counts) * 2,)](
        out,
        *(ref.to_fragment_order(x), w.codes, w.scales, gate, rows, n, k, w.tile_words, most, 0),
        *(apart, n1, n1, rows * most, 2 * apart, n2, n2, 2 * rows * most),
        BITS=8,
        GROUP=128,
        STEP=64,
        BM=16,
        BN=32,
        RESIDUAL=False,
        GATED=False,
    )
    for i, count in enumerate(counts):
        part, stride = out[i * rows * most :][: rows * most], most if i == 0 else count
        got = part[: rows * stride].reshape(rows, stride)
        assert_close(
            got[:, :count], x.float() @ w.dense[i, :count].T, rounding(8)
        ) if count else None
        assert not got[:, count:].any()
        assert not part[rows * stride :].any()


@pytest.mark.parametrize("gated", [False, True])
def test_projection_adds_to_the_residual_stream(gated: bool) -> None:
    rows, n, k = 20, 64, 128
    w, x = ref.random_weight(1, n, k, 8, 128), bf16_rows(rows, k)
    hidden, gate = torch.randn(rows, n), torch.randn(rows)
    expected = x.float() @ w.dense[0].T
    expected = hidden + (expected * gate.sigmoid()[:, None] if gated else expected)
    args = (ref.to_fragment_order(x), w.codes, w.scales, gate, rows, n, k, w.tile_words, n, 0)
    shape = {"BITS": 8, "GROUP": 128, "STEP": 128, "BM": 16, "BN": 32}
    dense.project[(2 * 2,)](hidden, *args, *ALONE, **shape, RESIDUAL=True, GATED=gated)
    assert_close(hidden, expected, rounding(8))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_gate_and_up_in_one_product(bits: int, group: int) -> None:
    rows, n, k = 18, 128, 128
    w, x = ref.random_weight(2, n, k, bits, group), bf16_rows(rows, k)
    out = torch.empty(rows, n, dtype=torch.bfloat16)
    args = (ref.to_fragment_order(x), w.codes, w.scales, rows, n, k, w.tile_words)
    shape = {"BITS": bits, "GROUP": group, "STEP": 64, "BM": 16, "BN": 64}
    dense.project_pair[(2 * 2,)](out, *args, n // 16 * w.tile_words, **shape)
    gate, up = x.float() @ w.dense[0].T, x.float() @ w.dense[1].T
    assert_close(
        ref.from_fragment_order(out), torch.nn.functional.silu(gate) * up, rounding(bits, ROUNDED)
    )


def test_rows_beside_a_row_do_not_change_its_bits() -> None:
    n, k = 64, 256
    w, x = ref.random_weight(1, n, k, 4, 128), ref.to_fragment_order(bf16_rows(40, k))
    many, few = torch.empty(40, n), torch.empty(1, n)
    gate = torch.empty(0)
    for out, rows, of, tile in ((many, 40, x, 32), (few, 1, x[17:18].contiguous(), 16)):
        args = (of, w.codes, w.scales, gate, rows, n, k, w.tile_words, n, 0)
        shape = {"BITS": 4, "GROUP": 128, "STEP": 128, "BM": tile, "BN": 32}
        dense.project[(2 * blocks(rows, tile),)](
            out, *args, *ALONE, **shape, RESIDUAL=False, GATED=False
        )
    assert torch.equal(many[17], few[0])


def window_of(rows: int, columns: int, *, empty: bool) -> torch.Tensor:
    return torch.zeros(rows, columns) if empty else torch.randn(rows, columns)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("rows", ROWS)
def test_convolution(rows: int, first: bool) -> None:
    key_heads, heads, dim = 1, 2, 128
    channels = (2 * key_heads + heads) * dim
    proj, taps = bf16_rows(rows, channels + 32), torch.randn(4, channels)
    window = window_of(3, channels, empty=first)
    expected, after = ref.conv_silu_norm(
        proj[:, :channels].float(), window, taps, key_heads * dim, dim
    )
    out = torch.empty(rows, channels, dtype=torch.bfloat16)
    conv.conv_silu_norm[(channels // dim, blocks(rows, 32))](
        out, proj, window, taps, rows, channels + 32, channels, key_heads, dim**-0.5, BT=32, DIM=dim
    )
    assert_close(out, expected, ROUNDED)
    conv.conv_window[(blocks(channels, 256),)](
        window, proj, rows, channels + 32, channels, BLOCK=256
    )
    assert torch.equal(window, after)


class Delta:
    """One layer's gated delta rule through its three kernels."""

    def __init__(self, rows: int, *, repeated: bool = False) -> None:
        self.key_heads, self.heads, self.dim = 1, 2, 128
        qkv = torch.randn(rows, 4, self.dim)
        if repeated:  # the same token again and again
            qkv[:] = qkv[:1].clone()
        qkv[:, :2] /= qkv[:, :2].norm(dim=-1, keepdim=True)
        qkv[:, 0] *= self.dim**-0.5
        self.qkv = qkv.reshape(rows, -1).to(torch.bfloat16)
        self.gates = torch.randn(rows, 2 * self.heads)
        if repeated:
            self.gates[:] = 4.0
        self.decay_rate = -torch.rand(self.heads) * (0.01 if repeated else 1.0)
        self.dt_bias = torch.randn(self.heads)
        self.z = bf16_rows(rows, self.heads * self.dim)
        self.norm = torch.rand(self.dim) + 0.5

    def expected(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(self.qkv)
        qkv = self.qkv.float().reshape(rows, 4, self.dim)
        q, k = (qkv[:, i : i + 1].expand(-1, self.heads, -1) for i in (0, 1))
        b, a = self.gates.chunk(2, dim=1)
        decay = self.decay_rate * torch.nn.functional.softplus(a + self.dt_bias)
        out, state = ref.gated_delta(q, k, qkv[:, 2:], decay, b.sigmoid(), state)
        z = self.z.float().reshape(rows, self.heads, self.dim)
        out = ref.rms_norm(out, self.norm, 1e-6) * torch.nn.functional.silu(z)
        return out.reshape(rows, -1), state

    def run(
        self, state: torch.Tensor, begin: int = 0, end: int | None = None, offset: int = 0
    ) -> torch.Tensor:
        qkv, gates, z = (x[begin:end].contiguous() for x in (self.qkv, self.gates, self.z))
        rows, dim, heads, channels = len(qkv), self.dim, self.heads, qkv.shape[1]
        chunks = blocks(offset + rows, 64)
        w, u = (torch.empty(chunks, heads, 64, dim, dtype=torch.bfloat16) for _ in range(2))
        sums = torch.empty(chunks, heads, 64)
        states = torch.empty(chunks, heads, dim, dim, dtype=torch.bfloat16)
        core = torch.empty(rows, heads * dim, dtype=torch.bfloat16)
        sizes = (rows, offset, channels)
        delta_prepare.delta_prepare[(heads, chunks)](
            w,
            u,
            sums,
            qkv,
            gates,
            self.decay_rate,
            self.dt_bias,
            *sizes,
            2 * heads,
            self.key_heads,
            heads,
            DIM=dim,
            PRECISION="tf32",
        )
        delta_scan.delta_scan[(2, heads)](
            state, states, u, w, sums, qkv, *sizes, self.key_heads, heads, DIM=dim, BV=64
        )
        delta_output.delta_output[(heads, chunks)](
            core,
            states,
            u,
            sums,
            qkv,
            z,
            self.norm,
            *sizes,
            heads * dim,
            self.key_heads,
            heads,
            1e-6,
            DIM=dim,
        )
        return ref.from_fragment_order(core)


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("rows", ROWS)
def test_gated_delta_rule(rows: int, first: bool) -> None:
    delta = Delta(rows)
    state = torch.zeros(2, 128, 128) if first else torch.randn(2, 128, 128)
    expected, after = delta.expected(state)
    assert_close(delta.run(state), expected, 2e-2)
    assert_close(state, after, 1e-2)


def test_gated_delta_rule_where_keys_repeat() -> None:
    delta = Delta(130, repeated=True)
    state = torch.zeros(2, 128, 128)
    expected, after = delta.expected(state)
    assert_close(delta.run(state), expected, 2e-2)
    assert_close(state, after, 1e-2)


def test_pieces_that_end_on_chunks_give_the_same_bits() -> None:
    delta = Delta(150)
    whole, pieces = torch.randn(2, 128, 128).repeat(2, 1, 1).chunk(2)
    pieces = pieces.clone()
    expected = delta.run(whole)
    assert torch.equal(torch.cat([delta.run(pieces, 0, 64), delta.run(pieces, 64, 150)]), expected)
    assert torch.equal(pieces, whole)


def test_a_piece_may_begin_inside_a_chunk() -> None:
    delta = Delta(150)
    state = torch.randn(2, 128, 128)
    expected, after = delta.expected(state)
    got = torch.cat([delta.run(state, 0, 70), delta.run(state, 70, 150, offset=6)])
    assert_close(got, expected, 2e-2)
    assert_close(state, after, 1e-2)


def routed(
    logits: torch.Tensor, top_k: int, block_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, weights, order and work of some tokens."""
    rows, experts = logits.shape
    width = max(16, 1 << (experts - 1).bit_length())
    parts, picks = blocks(rows, 16), rows * top_k
    ids, ranks, order = (torch.full((picks,), -1, dtype=torch.int32) for _ in range(3))
    weights = torch.empty(rows, top_k)
    counts, places = (torch.full((parts, experts), -1, dtype=torch.int32) for _ in range(2))
    most = picks // block_rows + experts
    work = torch.full((1 + 3 * most,), -1, dtype=torch.int32)
    sizes = {"BT": 16, "EXPERTS": width, "TOP": 1 << (top_k - 1).bit_length()}
    route.top_experts[(parts,)](ids, weights, ranks, counts, logits, rows, experts, top_k, **sizes)
    route.plan_experts[(1,)](
        places, work, counts, parts, experts, block_rows, EXPERTS=width, BLOCKS=4
    )
    route.sort_picks[(blocks(picks, 64),)](
        order, ids, ranks, places, picks, experts, 16 * top_k, BLOCK=64
    )
    return ids.reshape(rows, top_k), weights, order, work


@pytest.mark.parametrize("experts", [8, 20])
@pytest.mark.parametrize("rows", ROWS)
def test_routing(rows: int, experts: int) -> None:
    top_k, block_rows = 3, 16
    logits = torch.randn(rows, experts).mul(2).round()  # many ties
    ids, weights, order, work = routed(logits, top_k, block_rows)
    expected_ids, expected_weights = ref.top_experts(logits, top_k)
    assert torch.equal(ids, expected_ids)
    assert torch.allclose(weights, expected_weights)
    flat = ids.reshape(-1)
    assert torch.equal(order.long(), torch.sort(flat, stable=True).indices)
    pieces = work[1 : 1 + 3 * int(work[0])].reshape(-1, 3).tolist()
    seen = [p for _, first, end in pieces for p in range(first, min(first + block_rows, end))]
    assert seen == list(range(rows * top_k))
    assert all(flat[order[first]] == expert for expert, first, _ in pieces)


def test_logits_that_are_not_finite_take_experts_that_are_there() -> None:
    logits = torch.randn(20, 6)
    logits[3], logits[7, :5], logits[11] = float("nan"), float("-inf"), float("-inf")
    ids, _, order, _ = routed(logits, 3, 16)
    assert torch.equal(order.sort().values, torch.arange(60, dtype=torch.int32))
    assert ids.min() >= 0
    assert ids.max() < 6


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("rows", [1, 65])
def test_routed_experts(bits: int, group: int, rows: int) -> None:
    hidden, inner, experts, top_k, tile = 128, 128, 6, 2, 16
    gate_up = ref.random_weight(experts, 2 * inner, hidden, bits, group)
    down = ref.random_weight(experts, hidden, inner, bits, group)
    x, logits = bf16_rows(rows, hidden), torch.randn(rows, experts)
    ids, weights, order, work = routed(logits, top_k, tile)
    most = rows * top_k // tile + experts
    shape = {"BITS": bits, "GROUP": group, "STEP": 64, "BM": tile, "BN": 64}
    act = torch.zeros(rows * top_k, inner, dtype=torch.bfloat16)
    moe.expert_gate_up[(inner // 64 * most,)](
        act,
        ref.to_fragment_order(x),
        gate_up.codes,
        gate_up.scales,
        order,
        work,
        inner,
        hidden,
        gate_up.tile_words,
        top_k,
        **shape,
    )
    parts = torch.zeros(rows * top_k, hidden)
    moe.expert_down[(hidden // 64 * most,)](
        parts,
        act,
        down.codes,
        down.scales,
        order,
        work,
        hidden,
        inner,
        down.tile_words,
        **shape,
    )
    residual = torch.randn(rows, hidden)
    got = residual.clone()
    moe.combine_experts[(2, rows)](got, parts, weights, hidden, top_k, BLOCK=64)
    expected = ref.experts(x.float(), ids, weights, gate_up.dense, down.dense)
    assert_close(got - residual, expected, rounding(bits, ROUNDED))


class Attention:
    """One layer's attention through its two kernels, over pages in no order."""

    heads, kv_heads, dim, half = 4, 2, 256, 32

    def __init__(self, length: int) -> None:
        self.proj = bf16_rows(length, (2 * self.heads + 2 * self.kv_heads) * self.dim)
        self.q_norm, self.k_norm = (torch.rand(self.dim) + 0.5 for _ in range(2))
        self.frequency = 10000.0 ** (-torch.arange(self.half) / self.half)
        count = blocks(length, 64)
        self.pages = torch.randperm(count, dtype=torch.int32) + 1
        # What was never written must not count.
        self.kv = torch.full(
            (count + 1, 2, self.kv_heads, 64, self.dim), float("nan"), dtype=torch.bfloat16
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        length, dim = len(self.proj), self.dim
        proj = self.proj.float()
        q = proj[:, : 2 * self.heads * dim].reshape(length, self.heads, 2, dim)
        k, v = proj[:, 2 * self.heads * dim :].reshape(length, 2, self.kv_heads, dim).unbind(1)
        position = torch.arange(length)
        queries = ref.rms_norm(q[:, :, 0], self.q_norm, 1e-6)
        queries = ref.rotate(queries, position, self.frequency) * dim**-0.5
        keys = ref.rotate(ref.rms_norm(k, self.k_norm, 1e-6), position, self.frequency)
        out = ref.attention(queries, keys, v, 0) * q[:, :, 1].sigmoid()
        return out.reshape(length, -1), keys, v

    def run(self, begin: int, end: int, tokens: int = 64) -> torch.Tensor:
        proj = self.proj[begin:end].contiguous()
        rows, stride = proj.shape
        q = torch.empty(rows, self.heads, self.dim, dtype=torch.bfloat16)
        core = torch.empty(rows, self.heads * self.dim, dtype=torch.bfloat16)
        place = (rows, begin, stride, self.kv.stride(0), self.heads, self.kv_heads)
        attention_append.attention_append[(self.heads + 2 * self.kv_heads, blocks(rows, 8))](
            q,
            self.kv,
            proj,
            self.q_norm,
            self.k_norm,
            self.frequency,
            self.pages,
            *place,
            self.half,
            1e-6,
            self.dim**-0.5,
            BT=8,
            DIM=self.dim,
        )
        attention.attention[(self.kv_heads, blocks(rows, 16))](
            core, q, self.kv, proj, self.pages, *place, BM=32, BN=tokens, DIM=self.dim
        )
        return ref.from_fragment_order(core)


@pytest.mark.parametrize("rows", ROWS)
def test_attention_from_the_first_token(rows: int) -> None:
    layer = Attention(rows)
    expected, keys, values = layer.expected()
    assert_close(layer.run(0, rows), expected, 2e-2)
    kept = layer.kv[layer.pages.long()].permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :rows]
    assert_close(kept[0], keys, ROUNDED)
    assert torch.equal(kept[1].float(), values)


@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("start", [1, 64, 100])
def test_attention_over_earlier_tokens(start: int, tokens: int) -> None:
    layer = Attention(140)
    got = torch.cat([layer.run(0, start, tokens), layer.run(start, 140, tokens)])
    assert_close(got, layer.expected()[0], 2e-2)


def test_attention_in_pieces_gives_the_same_bits() -> None:
    layer = Attention(140)
    whole = layer.run(0, 140)
    layer.kv.fill_(float("nan"))
    assert torch.equal(torch.cat([layer.run(0, 64), layer.run(64, 140)]), whole)
