"""Routing and experts."""

from __future__ import annotations

import torch

import prefill_reference as ref
from qwen_moe.kernels import moe, route, specs

from .inputs import Case, Inputs, Variant, cdiv, label, relative
from .projections import GEMM

SMALL = [
    (16, 128, 4, 4, 128),
    (16, 128, 4, 6, 64),
    (16, 64, 4, 4, 128),
    (32, 128, 4, 3, 128),
    (32, 128, 4, 4, 64),
    (32, 128, 4, 5, 64),
]


class Experts(Inputs):
    """Routing and experts."""

    def experts(self, t: int) -> list[Case]:
        s, picks = self.s, t * self.s.top_k
        gate_up = self.weight("experts gate_up", s.experts, 2 * s.inner, s.hidden, 4)
        down = self.weight("experts down", s.experts, s.hidden, s.inner, 4)
        x, logits = self.rows(t, s.hidden), self.floats(t, s.experts)
        ordered = ref.to_fragment_order(x)
        width, tokens = max(16, 1 << (s.experts - 1).bit_length()), 4 if t <= 512 else 16
        parts = cdiv(t, tokens)
        ids, ranks, order = (self.empty(picks, dtype=torch.int32) for _ in range(3))
        weights = self.empty(t, s.top_k, dtype=torch.float32)
        counts, places = (self.empty(parts, s.experts, dtype=torch.int32) for _ in range(2))
        act, partial = self.empty(picks, s.inner), self.empty(picks, s.hidden)
        hidden = self.floats(t, s.hidden)
        work: dict[int, torch.Tensor] = {}

        def top(config: dict[str, int]) -> None:
            route.top_experts[(parts,)](
                ids,
                weights,
                ranks,
                counts,
                logits,
                t,
                s.experts,
                s.top_k,
                BT=tokens,
                EXPERTS=width,
                TOP=1 << (s.top_k - 1).bit_length(),
                **config,
            )

        def plan(rows: int, warps: int = 8) -> None:
            if rows not in work:
                work[rows] = self.empty(1 + 3 * (picks // rows + s.experts), dtype=torch.int32)
            route.plan_experts[(1,)](
                places,
                work[rows],
                counts,
                parts,
                s.experts,
                rows,
                EXPERTS=width,
                BLOCKS=32,
                num_warps=warps,
            )

        def sort() -> None:
            route.sort_picks[(cdiv(picks, 256),)](
                order, ids, ranks, places, picks, s.experts, tokens * s.top_k, BLOCK=256
            )

        def first(config: dict[str, int]) -> None:
            bm, bn = config["BM"], config["BN"] // 2
            moe.expert_gate_up[(s.inner // bn * (picks // bm + s.experts),)](
                act,
                ordered,
                gate_up.codes,
                gate_up.scales,
                order,
                work[bm],
                s.inner,
                s.hidden,
                gate_up.tile_words,
                s.top_k,
                BITS=4,
                GROUP=128,
                **{**config, "BN": bn},
            )

        def second(config: dict[str, int]) -> None:
            bm, bn = config["BM"], config["BN"]
            moe.expert_down[(s.hidden // bn * (picks // bm + s.experts),)](
                partial,
                act,
                down.codes,
                down.scales,
                order,
                work[bm],
                s.hidden,
                s.inner,
                down.tile_words,
                BITS=4,
                GROUP=128,
                **config,
            )

        def combine(block: int) -> None:
            moe.combine_experts[(cdiv(s.hidden, block), t)](
                hidden, partial, weights, s.hidden, s.top_k, BLOCK=block
            )

        configs = self.tiles(SMALL + GEMM)
        # The first configuration is that of the table for so many rows.
        mean = picks / s.experts
        wanted = 16 if mean <= 8 else 32 if mean <= 32 else 64 if mean <= 96 else 128
        if not self.quick:
            table = next(self.config(t) for t in specs.EXPERT_TILES if t.rows == wanted)
            configs.sort(key=lambda c: c != table)
        top({"num_warps": 4})
        for config in configs:
            plan(config["BM"])
        sort()

        def check_top() -> float:
            expected = ref.top_experts(logits, s.top_k)
            if not torch.equal(ids.reshape(t, -1), expected[0]):
                return float("inf")
            return relative(weights, expected[1])

        def check_sort() -> float:
            flat = ids.long()
            return 0.0 if torch.equal(order.long(), flat.sort(stable=True).indices) else 1.0

        def some() -> tuple[torch.Tensor, torch.Tensor]:
            """Tokens to check, and what their experts add up to."""
            at = self.sample(t)[-64:]
            chosen = ids.reshape(t, -1)[at]
            return at, ref.experts(x[at].float(), chosen, weights[at], gate_up.dense, down.dense)

        def check_act() -> float:
            at = self.sample(picks)[-64:]
            pick = order[at].long()
            token, expert = pick // s.top_k, ids[pick].long()
            both = torch.einsum("pk,pnk->pn", x[token].float(), gate_up.dense[expert])
            gate, up = both.chunk(2, dim=-1)
            return relative(ref.from_fragment_order(act)[at], torch.nn.functional.silu(gate) * up)

        def check_down() -> float:
            at, expected = some()
            got = (partial.reshape(t, s.top_k, -1)[at].float() * weights[at][..., None]).sum(1)
            return relative(got, expected)

        def check_combine() -> float:
            hidden.zero_()
            combine(512)
            at, expected = some()
            return relative(hidden[at], expected)

        weight_bytes = min(s.experts, picks)
        return [
            Case(
                "top_experts",
                s.layers,
                [Variant(f"num_warps={n}", lambda n=n: top({"num_warps": n})) for n in (8, 4)],
                check_top,
                bytes=4.0 * t * s.experts,
            ),
            Case(
                "plan_experts",
                s.layers,
                [Variant(f"num_warps={n}", lambda n=n: plan(wanted, n)) for n in (4, 8)],
                lambda: 0.0,
            ),
            Case("sort_picks", s.layers, [Variant("", sort)], check_sort),
            Case(
                "experts gate_up int4",
                s.layers,
                [Variant(label(c), lambda c=c: first(c)) for c in configs],
                check_act,
                flops=4.0 * picks * s.hidden * s.inner,
                bytes=gate_up.data.numel() / s.experts * weight_bytes
                + 2.0 * picks * (s.hidden + s.inner),
            ),
            Case(
                "experts down int4",
                s.layers,
                [Variant(label(c), lambda c=c: second(c)) for c in configs],
                check_down,
                flops=2.0 * picks * s.hidden * s.inner,
                bytes=down.data.numel() / s.experts * weight_bytes
                + 2.0 * picks * (s.hidden + s.inner),
            ),
            Case(
                "combine_experts",
                s.layers,
                [Variant(f"BLOCK={n}", lambda n=n: combine(n)) for n in (1024, 512, 2048)],
                check_combine,
                bytes=2.0 * picks * s.hidden + 8.0 * t * s.hidden,
            ),
        ]
