"""Every prefill kernel against plain torch, in Triton's interpreter.

Not collected by itself: tests/test_kernels_triton.py runs it where TRITON_INTERPRET is set before
anything imports Triton.
"""

from __future__ import annotations

import pytest
import torch

import prefill_reference as ref
from qwen_moe.kernels import dense, norm

ROWS = [1, 2, 63, 64, 65, 129]
ROUNDED = 6e-3  # of values that are cut to bf16 once, as the interpreter does
FORMATS = [(4, 128), (4, 64), (8, 128), (16, 64)]


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


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("rows", [1, 65])
def test_projection(bits: int, group: int, rows: int) -> None:
    n, k = 72, 256
    w, x = ref.random_weight(1, n, k, bits, group), bf16_rows(rows, k)
    out = torch.zeros(rows, n + 8)
    gate = torch.empty(0)
    args = (ref.to_fragment_order(x), w.codes, w.scales, gate, rows, n, k, w.tile_words, n + 8, 8)
    dense.project[(blocks(n, 32) * blocks(rows, 16),)](
        out, *args, BITS=bits, GROUP=group, BM=16, BN=32, RESIDUAL=False, GATED=False
    )
    assert_close(out[:, 8:], x.float() @ w.dense[0].T, 1e-6)
    assert not out[:, :8].any()


@pytest.mark.parametrize("gated", [False, True])
def test_projection_adds_to_the_residual_stream(gated: bool) -> None:
    rows, n, k = 20, 64, 128
    w, x = ref.random_weight(1, n, k, 8, 128), bf16_rows(rows, k)
    hidden, gate = torch.randn(rows, n), torch.randn(rows)
    expected = x.float() @ w.dense[0].T
    expected = hidden + (expected * gate.sigmoid()[:, None] if gated else expected)
    args = (ref.to_fragment_order(x), w.codes, w.scales, gate, rows, n, k, w.tile_words, n, 0)
    dense.project[(2 * 2,)](
        hidden, *args, BITS=8, GROUP=128, BM=16, BN=32, RESIDUAL=True, GATED=gated
    )
    assert_close(hidden, expected, 1e-6)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_gate_and_up_in_one_product(bits: int, group: int) -> None:
    rows, n, k = 18, 128, 128
    w, x = ref.random_weight(2, n, k, bits, group), bf16_rows(rows, k)
    out = torch.empty(rows, n, dtype=torch.bfloat16)
    args = (ref.to_fragment_order(x), w.codes, w.scales, rows, n, k, w.tile_words)
    dense.project_pair[(2 * 2,)](
        out, *args, n // 16 * w.tile_words, BITS=bits, GROUP=group, BM=16, BN=64
    )
    gate, up = x.float() @ w.dense[0].T, x.float() @ w.dense[1].T
    assert_close(ref.from_fragment_order(out), torch.nn.functional.silu(gate) * up, ROUNDED)


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_unpacked_weights(bits: int, group: int) -> None:
    n, k = 40, 256
    w = ref.random_weight(1, n, k, bits, group)
    out = torch.empty(n, k, dtype=torch.bfloat16)
    dense.unpack[(2, k // group)](
        out, w.codes, w.scales, n, k, w.tile_words, BITS=bits, GROUP=group, BN=32
    )
    assert_close(ref.from_fragment_order(out), w.dense[0], ROUNDED)


def test_rows_beside_a_row_do_not_change_its_bits() -> None:
    n, k = 64, 256
    w, x = ref.random_weight(1, n, k, 4, 128), ref.to_fragment_order(bf16_rows(40, k))
    many, few = torch.empty(40, n), torch.empty(1, n)
    gate = torch.empty(0)
    for out, rows, of, tile in ((many, 40, x, 32), (few, 1, x[17:18].contiguous(), 16)):
        args = (of, w.codes, w.scales, gate, rows, n, k, w.tile_words, n, 0)
        dense.project[(2 * blocks(rows, tile),)](
            out, *args, BITS=4, GROUP=128, BM=tile, BN=32, RESIDUAL=False, GATED=False
        )
    assert torch.equal(many[17], few[0])
