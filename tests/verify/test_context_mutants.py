"""Deliberate defects in sequences that ranks share, each of which `certify` catches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutation import (
    PACKED,
    PADDED,
    UNEVEN,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    count_tokens_along,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.models.layout import Layout
from paceline.parallel.context import blocks as blocks_module
from paceline.parallel.context import ring as ring_module
from paceline.parallel.context import token_ring, ulysses
from paceline.parallel.context.blocks import Block, Blocks, Queries, Sums
from paceline.parallel.context.share import SharedSequences
from paceline.parallel.context.travel import Ring
from paceline.parallel.context.ulysses import Exchange
from paceline.plan.plan import ContextConfig, MemoryConfig, Plan, ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

WINDOWED = replace(UNEVEN, window=6)
LEARNED = replace(UNEVEN, positions="learned", norm="layer", qk_norm="none")


def sharing(
    method: Any = "zigzag-ring", *, cp: int = 2, sequences: int = 3, **options: Any
) -> Plan:
    plan = plan_of(cp=cp, length=17, sequences=sequences, **options)
    return replace(plan, context=ContextConfig(method=method))


RINGS, ZIGZAG = sharing("ring", cp=3), sharing()
HEADS, MIXED, TOKENS = sharing("ulysses"), sharing("ulysses-ring", cp=4), sharing("token-ring")
KEPT = replace(ZIGZAG, memory=MemoryConfig(remat="full-keep-attention"))

DEFECTS = Defects(UNEVEN)
mutant = DEFECTS.of


@pytest.mark.parametrize("spec", [UNEVEN, WINDOWED, LEARNED], ids=["heads", "window", "learned"])
@pytest.mark.parametrize(
    "plan",
    [RINGS, ZIGZAG, HEADS, MIXED, TOKENS, KEPT],
    ids=["ring", "zigzag", "ulysses", "mixed", "tokens", "kept"],
)
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan, spec):
    certificate = certify_with(monkeypatch, plan, spec, nothing, PACKED, PADDED)
    assert certificate.certified, certificate.worst


# The ring


@mutant(RINGS)
def ring_step_skipped(patch: Patch, rank: int) -> None:
    """A rank does not meet the keys that come last."""
    original = Blocks.between

    def between(self: Blocks, query_part: int, key_part: int) -> tuple[Block, ...]:
        is_last = rank == 2 and key_part == 0
        return () if is_last else original(self, query_part, key_part)

    patch.setattr(Blocks, "between", between)


@mutant(RINGS)
def keys_of_another_part_taken_for_these(patch: Patch, _rank: int) -> None:
    original = Blocks.between
    patch.setattr(Blocks, "between", lambda self, q, k: original(self, q, (2 * q - k) % 3))


def _kept_home(patch: Patch, module: Any, purpose: str) -> None:
    """What comes in for a purpose is not added."""
    original = Ring.receive

    class Nothing:
        def __init__(self, pending: Any) -> None:
            self._pending = pending

        def wait(self) -> Tensor:
            return torch.zeros_like(self._pending.wait())

    def receive(self: Ring, like: Tensor, steps: int, wanted: str) -> Any:
        pending = original(self, like, steps, wanted)
        return Nothing(pending) if wanted == purpose else pending

    assert hasattr(module, "METHOD")
    patch.setattr(Ring, "receive", receive)


@mutant(RINGS)
def key_gradients_not_sent_home(patch: Patch, _rank: int) -> None:
    _kept_home(patch, ring_module, ring_module.GRADIENTS)


@mutant(TOKENS)
def query_gradients_not_sent_home(patch: Patch, _rank: int) -> None:
    _kept_home(patch, token_ring, token_ring.GRADIENTS)


@mutant(TOKENS)
def outputs_merged_without_their_sums(patch: Patch, _rank: int) -> None:
    """Every output that comes home weighs as much as the rank's own."""
    original = Sums.add

    def add(self: Sums, out: Tensor, lse: Tensor, queries: slice = slice(None)) -> None:
        is_whole = queries == slice(None)
        original(self, out, self.lse_BNT.clone() if is_whole else lse, queries)

    patch.setattr(Sums, "add", add)


@mutant(ZIGZAG)
def sums_merged_in_the_wrong_base(patch: Patch, _rank: int) -> None:
    original = blocks_module.merge
    patch.setattr(
        blocks_module,
        "merge",
        lambda out, lse, more, more_lse: original(out, lse, more, more_lse / math.log(2)),
    )


@mutant(ZIGZAG)
def gradients_of_a_block_by_its_own_sum(patch: Patch, _rank: int) -> None:
    """As if the keys of a block were all."""
    original = blocks_module.attend_block_backward

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        _, _, mask = rest
        out, lse = blocks_module.attend_block(q, k, v, mask, **options)
        return original(grad, q, k, v, out, lse.nan_to_num(neginf=0.0), mask, **options)

    patch.setattr(blocks_module, "attend_block_backward", backward)


# The blocks


def _first_seen(patch: Patch, change: Callable[[Layout, int | None], Tensor]) -> None:
    patch.setattr(blocks_module, "_first_seen", change)


@mutant(ZIGZAG, PACKED)
def document_boundary_leaked(patch: Patch, _rank: int) -> None:
    """A query sees all that is before it in the row."""
    _first_seen(patch, lambda layout, _: torch.zeros_like(layout.positions_BT))


@mutant(ZIGZAG, PACKED)
def document_boundary_off_by_one(patch: Patch, _rank: int) -> None:
    original = blocks_module._first_seen
    _first_seen(patch, lambda layout, window: (original(layout, window) - 1).clamp(min=0))


@mutant(RINGS, spec=WINDOWED)
def window_not_applied_across_chunks(patch: Patch, _rank: int) -> None:
    """Keys of another chunk are seen to its beginning."""
    original = Blocks._of

    def of(self: Blocks, queries: range, keys: range, *starts: int) -> Block | None:
        first_BS = self._first_BS
        if queries != keys:
            self._first_BS = torch.zeros_like(first_BS)
        try:
            return original(self, queries, keys, *starts)
        finally:
            self._first_BS = first_BS

    patch.setattr(Blocks, "_of", of)


@mutant(ZIGZAG)
def chunk_mask_off_by_one(patch: Patch, _rank: int) -> None:
    """Every mask is moved by a key."""
    original = Blocks._mask

    def mask(self: Blocks, low: Tensor, high: Tensor, keys: range) -> Any:
        return original(self, low, (high - 1).maximum(low + 1), keys)

    patch.setattr(Blocks, "_mask", mask)
    patch.setattr(Blocks, "_of", _masked(Blocks._of))


def _masked(original: Callable[..., Block | None]) -> Callable[..., Block | None]:
    """Blocks that would go without a mask get one."""

    def of(self: Blocks, queries: range, keys: range, *starts: int) -> Block | None:
        block = original(self, queries, keys, *starts)
        if block is None or not block.is_causal:
            return block
        places_T = torch.arange(len(range(*block.queries.indices(10**6))))[None]
        mask = self._mask(torch.zeros_like(places_T), places_T + 1, range(places_T.shape[1]))
        return replace(block, is_causal=False, mask=mask)

    return of


@mutant(ZIGZAG)
def own_chunk_not_causal(patch: Patch, _rank: int) -> None:
    original = Blocks._of

    def of(self: Blocks, *arguments: Any) -> Block | None:
        block = original(self, *arguments)
        return block and replace(block, is_causal=False)

    patch.setattr(Blocks, "_of", of)


# Heads


@mutant(HEADS)
def gradients_of_a_copied_head_not_summed(patch: Patch, _rank: int) -> None:
    """A key head that two ranks have gets the gradient of the last of them."""
    original = Exchange.to_tokens

    def to_tokens(self: Exchange, *tensors: Tensor) -> list[Tensor]:
        shares = self._shares
        self._shares = [replace(share) for share in shares]
        if len(tensors) > 1 and self._me == 0:
            copied = len(shares[0].key) - 1
            assert shares[0].key[-1] == shares[1].key[0], "no head is copied"
            tensors = (tensors[0], *(x.clone() for x in tensors[1:]))
            for x in tensors[1:]:
                x[:, :, copied] = 0
        return original(self, *tensors)

    patch.setattr(Exchange, "to_tokens", to_tokens)


@mutant(MIXED)
def ranks_of_a_part_in_the_wrong_order(patch: Patch, _rank: int) -> None:
    original = ulysses._cut

    def cut(rows: Tensor, batch: int, length: int, widths: Any) -> list[Tensor]:
        return [x.flip(1) for x in original(rows, batch, length, widths)]

    patch.setattr(ulysses, "_cut", cut)


# Sequences


@mutant(ZIGZAG)
def positions_of_a_part_from_zero(patch: Patch, _rank: int) -> None:
    original = Layout._part

    def part(self: Layout, places: Tensor, documents: Tensor) -> Layout:
        found = original(self, places, documents)
        positions = torch.arange(len(places)).expand(found.positions_BT.shape)
        return replace(found, positions_BT=positions)

    patch.setattr(Layout, "_part", part)


@mutant(sharing(dp_shard=2, sequences=6, zero=ZeroConfig(stage=2)))
def sum_over_ranks_dropped(patch: Patch, _rank: int) -> None:
    patch.setattr(SharedSequences, "finish_gradients", lambda *_: None)


@mutant(ZIGZAG)
def labels_of_another_part(patch: Patch, _rank: int) -> None:
    original = SharedSequences.share

    def share(self: SharedSequences, batch: Any) -> Any:
        found = original(self, batch)
        labels = original(self, replace(batch, labels_BT=batch.labels_BT.roll(1, 1))).labels_BT
        return replace(found, labels_BT=labels)

    patch.setattr(SharedSequences, "share", share)


@mutant(ZIGZAG)
def tokens_counted_on_every_rank(patch: Patch, _rank: int) -> None:
    count_tokens_along(patch, "cp")


@mutant(KEPT)
def kept_sums_are_of_another_pass(patch: Patch, _rank: int) -> None:
    """They are too large by a constant."""
    original = Queries.__init__

    def init(self: Queries, q: Tensor, grad: Tensor, out: Tensor, lse: Tensor) -> None:
        original(self, q, grad, out, lse + 0.5)

    patch.setattr(Queries, "__init__", init)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
