"""Deliberate defects in a decoder split over tensor ranks, each of which `certify` catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
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
    clip_by_own_norm,
    count_tokens_along,
    leave_out,
    nothing,
    plan_of,
    recompute_from,
)
from torch import Tensor

from paceline.data.batch import Batch
from paceline.data.loader import Loader
from paceline.dist.world import World
from paceline.kernels import cross_entropy
from paceline.optim.scale import LossScale
from paceline.parallel import apply as apply_module
from paceline.parallel.tensor import boundary, decoder, norm, vocabulary
from paceline.parallel.tensor.decoder import SplitDecoder
from paceline.parallel.tensor.vocabulary import SplitVocabulary
from paceline.plan.layout import Place
from paceline.plan.plan import ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

LEARNED = replace(UNEVEN, positions="learned", norm="layer", qk_norm="none")
WHOLE_NORMS = replace(UNEVEN, norm_placement="after", qk_norm="all")

ROWS = plan_of(tp=2, length=17, sequences=3)
WHOLE = plan_of(tp=2, length=17, sequences=3, sequence_parallel=False)
SHARDED = plan_of(tp=2, dp_shard=2, zero=ZeroConfig(stage=0), length=17, sequences=6)
RECOMPUTED = plan_of(tp=2, length=17, sequences=3, remat="full")

DEFECTS = Defects(UNEVEN)
mutant = DEFECTS.of


@pytest.mark.parametrize("spec", [UNEVEN, LEARNED, WHOLE_NORMS], ids=["heads", "learned", "whole"])
@pytest.mark.parametrize(
    "plan", [ROWS, WHOLE, SHARDED, RECOMPUTED], ids=["rows", "whole", "sharded", "recomputed"]
)
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan, spec):
    cases = [PACKED, PADDED] if plan is ROWS else [PADDED]
    certificate = certify_with(monkeypatch, plan, spec, nothing, *cases)
    assert certificate.certified, certificate.worst


# The boundaries


def _own_chunk(x: Tensor, world: World) -> Tensor:
    return x.chunk(world.degree("tp"), dim=1)[world.coordinate("tp")].clone()


@mutant(WHOLE)
def terms_never_summed(patch: Patch, _rank: int) -> None:
    patch.setattr(boundary._SumUp, "forward", staticmethod(lambda _ctx, x, _world: x.clone()))


@mutant(WHOLE)
def gradient_of_a_sum_summed_again(patch: Patch, _rank: int) -> None:
    original = boundary._SumUp.forward

    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return original(ctx, x, world)

    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.world.sum(grad.clone(), ("tp",), purpose="defect"), None

    patch.setattr(boundary._SumUp, "forward", staticmethod(forward))
    patch.setattr(boundary._SumUp, "backward", staticmethod(backward))


@mutant(ROWS)
def rows_gathered_in_the_wrong_order(patch: Patch, _rank: int) -> None:
    original = boundary._GatherRows.forward

    def forward(ctx: Any, x_1RD: Tensor, world: World) -> Tensor:
        return torch.cat(original(ctx, x_1RD, world).chunk(2, dim=1)[::-1], dim=1)

    patch.setattr(boundary._GatherRows, "forward", staticmethod(forward))


@mutant(ROWS)
def gradients_of_gathered_rows_never_summed(patch: Patch, _rank: int) -> None:
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _own_chunk(grad, ctx.world), None

    patch.setattr(boundary._GatherRows, "backward", staticmethod(backward))


@mutant(ROWS)
def rows_scattered_without_a_sum(patch: Patch, _rank: int) -> None:
    original = boundary._ScatterRows.forward

    def forward(ctx: Any, x_1RD: Tensor, world: World) -> Tensor:
        original(ctx, x_1RD, world)
        return _own_chunk(x_1RD, world)

    patch.setattr(boundary._ScatterRows, "forward", staticmethod(forward))


@mutant(ROWS)
def gradients_of_scattered_rows_never_gathered(patch: Patch, rank: int) -> None:
    def backward(_ctx: Any, grad: Tensor) -> Any:
        parts = [torch.zeros_like(grad), torch.zeros_like(grad)]
        parts[rank] = grad
        return torch.cat(parts, dim=1), None

    patch.setattr(boundary._ScatterRows, "backward", staticmethod(backward))


@mutant(ROWS, spec=LEARNED)
def positions_of_the_first_rank_s_rows(patch: Patch, _rank: int) -> None:
    patch.setattr(
        vocabulary, "own_rows", lambda x, world: boundary._padded(x, world).chunk(2, 1)[0]
    )


@mutant(ROWS, spec=LEARNED)
def gradient_of_positions_summed_twice(patch: Patch, _rank: int) -> None:
    patch.setattr(vocabulary, "own_rows", lambda x, w: boundary.own_rows(boundary.copy_in(x, w), w))


@mutant(ROWS)
def padding_before_the_tokens(patch: Patch, _rank: int) -> None:
    original = boundary._padded
    patch.setattr(
        boundary, "_padded", lambda x, world: original(x, world).roll(x.shape[1] % 2, dims=1)
    )


@mutant(ROWS)
def padding_taken_for_a_token(patch: Patch, _rank: int) -> None:
    def last(rows_1RD: Tensor, layout: Any) -> Tensor:
        shape = layout.positions_BT.shape
        return rows_1RD[0, -shape.numel() :].unflatten(0, tuple(shape))

    patch.setattr(vocabulary, "as_tokens", last)
    patch.setattr(decoder, "as_tokens", last)


# Attention and feed-forward


@mutant(ROWS)
def query_heads_read_the_wrong_key_heads(patch: Patch, _rank: int) -> None:
    original = decoder.head_share

    def shifted(*sizes: int) -> Any:
        heads = original(*sizes)
        return replace(heads, key_of_query=heads.key_of_query[::-1])

    patch.setattr(decoder, "head_share", shifted)


@mutant(ROWS)
def unequal_groups_of_heads_taken_for_equal_ones(patch: Patch, _rank: int) -> None:
    original = decoder.head_share

    def even(*sizes: int) -> Any:
        heads = original(*sizes)
        width = -(-len(heads.query) // len(heads.key))
        return replace(heads, key_of_query=tuple(i // width for i in range(len(heads.query))))

    patch.setattr(decoder, "head_share", even)


# What is whole, or copied: its gradient, and who stands for it


@mutant(ROWS)
def gradients_of_biases_behind_a_sum_not_summed(patch: Patch, _rank: int) -> None:
    leave_out(patch, "partial", lambda name: name.endswith(".bias"))


@mutant(ROWS)
def gradients_of_copied_key_heads_not_summed(patch: Patch, _rank: int) -> None:
    leave_out(patch, "copied", lambda name: name.endswith(".key.weight"))


@mutant(ROWS)
def gradients_of_whole_parameters_summed_twice(patch: Patch, _rank: int) -> None:
    original = SplitDecoder.finish_gradients

    def finish(self: SplitDecoder, parts: Any, axes: Any) -> None:
        original(self, parts, axes)
        original(replace(self, copied=frozenset()), parts, axes)

    patch.setattr(SplitDecoder, "finish_gradients", finish)


@mutant(SHARDED)
def gradients_of_copied_heads_summed_over_data_ranks_again(patch: Patch, _rank: int) -> None:
    original = SplitDecoder.finish_gradients
    patch.setattr(
        SplitDecoder,
        "finish_gradients",
        lambda self, parts, axes: original(self, parts, (*axes, "dp_shard")),
    )


@mutant(ROWS)
def copied_heads_counted_twice_in_the_norm(patch: Patch, _rank: int) -> None:
    original = decoder._place

    def place(shape: Any, rule: Any, rank: int) -> Place:
        found = original(shape, rule, rank)
        return found if rule.dim is None else replace(found, owned=found.box)

    patch.setattr(decoder, "_place", place)


@mutant(WHOLE)
def whole_parameters_counted_on_no_rank(patch: Patch, _rank: int) -> None:
    original = decoder._place
    patch.setattr(
        decoder,
        "_place",
        lambda shape, rule, _rank: original(shape, rule, 1 if rule.dim is None else _rank),
    )


@mutant(ROWS, PACKED)
def each_rank_clips_by_its_own_norm(patch: Patch, _rank: int) -> None:
    clip_by_own_norm(patch)


# The norm over all heads


@mutant(WHOLE, spec=WHOLE_NORMS)
def squares_of_one_rank_s_heads(patch: Patch, _rank: int) -> None:
    patch.setattr(norm, "sum_up", lambda x, _world: x)


@mutant(ROWS, spec=WHOLE_NORMS)
def gradient_of_the_squares_not_summed(patch: Patch, _rank: int) -> None:
    patch.setattr(norm, "copy_in", lambda x, _world: x)


@mutant(ROWS, spec=WHOLE_NORMS)
def squares_of_a_copied_head_counted_twice(patch: Patch, _rank: int) -> None:
    original = decoder.SplitRMSNorm
    patch.setattr(
        decoder,
        "SplitRMSNorm",
        lambda whole, columns, _owned, world: original(whole, columns, columns, world),
    )


# The vocabulary and the loss


def _shift_own_words(patch: Patch) -> None:
    original = SplitVocabulary.__init__

    def init(self: SplitVocabulary, size: int, world: World, **options: Any) -> None:
        original(self, size, world, **options)
        self.own = range(self.own.start + 1, self.own.stop + 1)

    patch.setattr(SplitVocabulary, "__init__", init)


@mutant(ROWS)
def words_off_by_one(patch: Patch, _rank: int) -> None:
    _shift_own_words(patch)


@mutant(WHOLE)
def words_of_other_ranks_embedded_as_the_first(patch: Patch, _rank: int) -> None:
    def embed(self: SplitVocabulary, tokens_BT: Tensor, look_up: Any) -> Tensor:
        here_BT = (tokens_BT >= self.own.start) & (tokens_BT < self.own.stop)
        x_BTD = look_up((tokens_BT - self.own.start).where(here_BT, 0))
        return boundary.sum_up(x_BTD, self._world)

    patch.setattr(SplitVocabulary, "embed", embed)


@mutant(ROWS)
def largest_logit_of_one_rank(patch: Patch, _rank: int) -> None:
    patch.setattr(SplitVocabulary, "largest", lambda _self, values: values)


def _sum_of_the_loss(patch: Patch, turn: int, instead: Callable[[Tensor, Any], Tensor]) -> None:
    """Patches one of the two sums of a chunk: that of targets' logits (0), or of exponents (1)."""
    original, calls = SplitVocabulary.sum, count()

    def total(self: SplitVocabulary, values: Tensor) -> Tensor:
        if next(calls) % 2 != turn:
            return original(self, values)
        return instead(values, lambda x: original(self, x))

    patch.setattr(SplitVocabulary, "sum", total)


@mutant(ROWS)
def exponents_of_one_rank(patch: Patch, _rank: int) -> None:
    _sum_of_the_loss(patch, 1, lambda values, _sum: values)


@mutant(WHOLE)
def target_s_logit_of_one_rank(patch: Patch, _rank: int) -> None:
    _sum_of_the_loss(patch, 0, lambda values, _sum: values)


@mutant(ROWS)
def target_s_logit_counted_on_both_ranks(patch: Patch, _rank: int) -> None:
    _sum_of_the_loss(patch, 0, lambda values, total: 2 * total(values))


@mutant(WHOLE)
def targets_of_other_ranks_taken_for_the_first_word(patch: Patch, _rank: int) -> None:
    original = cross_entropy._split_chunk

    def chunk(logits_CV: Tensor, labels_C: Tensor, wide: Any, columns: Any) -> Any:
        loss, grad_CV = original(logits_CV, labels_C, wide, columns)
        is_here_C = (labels_C >= columns.own.start) & (labels_C < columns.own.stop)
        grad_CV[~is_here_C, 0] -= 1
        return loss, grad_CV

    patch.setattr(cross_entropy, "_split_chunk", chunk)


# The scale, the data and the weights


@mutant(WHOLE)
def tokens_counted_once_a_tensor_rank(patch: Patch, _rank: int) -> None:
    count_tokens_along(patch, "tp")


@mutant(ROWS)
def loss_summed_over_tensor_ranks(patch: Patch, _rank: int) -> None:
    patch.setattr(LossScale, "mean_loss", lambda self, total: 2 * total.item() / self.count)


@mutant(ROWS)
def one_tensor_rank_reads_the_next_tokens(patch: Patch, rank: int) -> None:
    original = Loader.microbatches

    def microbatches(self: Loader, step: int, data_index: int) -> list[Batch]:
        found = original(self, step, data_index)
        others = found[rank:] + found[:rank]
        return [
            replace(mine, tokens_BT=other.tokens_BT)
            for mine, other in zip(found, others, strict=True)
        ]

    patch.setattr(Loader, "microbatches", microbatches)


@mutant(ROWS)
def one_tensor_rank_s_norms_start_a_little_aside(patch: Patch, rank: int) -> None:
    original = apply_module._PartWeights.read

    def read(self: Any, name: str) -> Tensor:
        value = original(self, name)
        return value.double() * (1 + rank * 1e-10) if "norm" in name else value

    patch.setattr(apply_module._PartWeights, "read", read)


@mutant(WHOLE, PACKED)
def one_tensor_rank_s_momentum_lost(patch: Patch, rank: int) -> None:
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD) -> None:
        for group in self.param_groups:
            group["momentum"] = 0.9 - 0.1 * rank
        original(self)

    patch.setattr(torch.optim.SGD, "step", step)


@mutant(RECOMPUTED)
def a_block_computed_again_from_something_else(patch: Patch, _rank: int) -> None:
    recompute_from(patch, 1.001)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
