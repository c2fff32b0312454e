"""Deliberate defects in experts, their balance and how ranks share them: `certify` catches each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mutation import (
    PADDED,
    UNEVEN,
    Defects,
    Patch,
    assert_caught,
    certify_with,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.dist.world import World
from paceline.models import balance
from paceline.models.balance import Balance, as_they_are, sequences_of
from paceline.models.dispatch import Arrived
from paceline.models.layout import Layout
from paceline.models.moe import MixtureOfExperts
from paceline.parallel import apply as apply_module
from paceline.parallel.data.base import DataParallel
from paceline.parallel.expert import all_to_all, experts, load
from paceline.parallel.expert.all_to_all import AllToAll
from paceline.parallel.expert.experts import SplitExperts
from paceline.plan.layout import Place
from paceline.plan.model_spec import MoeSpec
from paceline.plan.plan import ExpertConfig, Plan, ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

GROUPED = replace(
    UNEVEN,
    family="pangu-moe",
    ffn_bias=False,
    moe=MoeSpec(
        num_experts=8,
        experts_per_token=4,
        d_expert=12,
        num_groups=4,
        expert_scales=True,
        normalize_weights=False,
        d_shared=20,
    ),
)
GATED = replace(
    GROUPED,
    family="qwen2-moe",
    moe=MoeSpec(
        num_experts=4,
        experts_per_token=2,
        d_expert=12,
        d_shared=20,
        shared_gate=True,
        dense_layers=(0,),
    ),
)


def sparse(zero: ZeroConfig | None = None, **options: Any) -> Plan:
    plan = plan_of(length=17, zero=zero, **options)
    return replace(plan, expert=ExpertConfig(balance_loss_weight=0.3))


ALONE = sparse(sequences=3)
TWO = sparse(dp_shard=2, ep=2, sequences=6, zero=ZeroConfig(stage=0))
REPLICAS = sparse(dp_shard=4, ep=2, sequences=12, zero=ZeroConfig(stage=1))
ROWS = sparse(tp=2, ep=2, sequences=3)
WHOLE = sparse(tp=2, sequences=3, sequence_parallel=False)
RECOMPUTED = sparse(dp_shard=2, ep=2, sequences=6, remat="full")

DEFECTS = Defects(GROUPED)
mutant = DEFECTS.of


@pytest.mark.parametrize(
    "plan",
    [ALONE, TWO, REPLICAS, ROWS, WHOLE, RECOMPUTED],
    ids=["alone", "two", "replicas", "rows", "whole", "recomputed"],
)
@pytest.mark.parametrize("spec", [GROUPED, GATED], ids=["grouped", "gated"])
def test_without_a_defect_the_same_path_is_certified(monkeypatch, plan, spec):
    certificate = certify_with(monkeypatch, plan, spec, nothing, PADDED)
    assert certificate.certified, certificate.worst


# The balance loss


def _scale_by(patch: Patch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Changes the gradient of the balance loss, knowing that of the output."""
    original = balance._WithLoss.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        grad_output, grad_loss, _ = original(ctx, *grads)
        return grad_output, change(grad_loss, grad_output), None

    patch.setattr(balance._WithLoss, "backward", staticmethod(backward))


@mutant(ALONE)
def balance_loss_counted_twice(patch: Patch, _rank: int) -> None:
    _scale_by(patch, lambda grad, _output: 2 * grad)


@mutant(ALONE)
def balance_loss_forgotten(patch: Patch, _rank: int) -> None:
    _scale_by(patch, lambda grad, _output: 0 * grad)


@mutant(ALONE)
def balance_loss_left_out_where_the_output_has_no_gradient(patch: Patch, _rank: int) -> None:
    """As where it is an addition to the loss of tokens that have a label."""
    _scale_by(patch, lambda grad, output: grad * (output != 0).any(dim=1).double().mean())


@mutant(WHOLE)
def balance_loss_counted_by_every_tensor_rank(patch: Patch, _rank: int) -> None:
    _scale_by(patch, lambda grad, _output: 2 * grad)


@mutant(ROWS)
def frequencies_of_a_rank_alone(patch: Patch, _rank: int) -> None:
    original = Balance.__init__

    def init(self: Balance, *sizes: int, **options: Any) -> None:
        original(self, *sizes, **options | {"sum_up": as_they_are})

    patch.setattr(Balance, "__init__", init)


def _see(patch: Patch, change: Callable[[Layout], Layout]) -> None:
    """Has the balance see other layouts than there are."""
    patch.setattr(load, "sequences_of", lambda layout: sequences_of(change(layout)))


@mutant(ALONE)
def padding_counted(patch: Patch, _rank: int) -> None:
    _see(patch, lambda layout: replace(layout, documents_BT=None))


@mutant(ROWS)
def padding_of_rows_counted(patch: Patch, _rank: int) -> None:
    patch.setattr(load, "PADDING", 0)


@mutant(sparse(sequences=6))
def one_balance_for_a_micro_batch(patch: Patch, _rank: int) -> None:
    """And not one for each of its sequences."""
    patch.setattr(load, "sequences_of", lambda layout: sequences_of(layout).clamp(max=0))


# Routing and what is shared


@mutant(TWO)
def groups_ignored(patch: Patch, _rank: int) -> None:
    def choose(self: MixtureOfExperts, probs_RE: Tensor) -> tuple[Tensor, Tensor]:
        weights_RC, experts_RC = probs_RE.topk(self.moe.experts_per_token, dim=-1)
        return weights_RC * self.expert_scales[experts_RC], experts_RC

    patch.setattr(MixtureOfExperts, "choose", choose)


@mutant(TWO)
def weights_dropped_on_the_way_back(patch: Patch, _rank: int) -> None:
    original = MixtureOfExperts.choose

    def choose(self: MixtureOfExperts, probs_RE: Tensor) -> tuple[Tensor, Tensor]:
        weights_RC, experts_RC = original(self, probs_RE)
        return torch.ones_like(weights_RC), experts_RC

    patch.setattr(MixtureOfExperts, "choose", choose)


@mutant(TWO)
def weights_without_a_gradient(patch: Patch, _rank: int) -> None:
    original = MixtureOfExperts.choose

    def choose(self: MixtureOfExperts, probs_RE: Tensor) -> tuple[Tensor, Tensor]:
        weights_RC, experts_RC = original(self, probs_RE)
        return weights_RC.detach(), experts_RC

    patch.setattr(MixtureOfExperts, "choose", choose)


@mutant(ROWS)
def shared_experts_summed_twice(patch: Patch, _rank: int) -> None:
    original = MixtureOfExperts._shared
    patch.setattr(MixtureOfExperts, "_shared", lambda *arguments: 2 * original(*arguments))


# The dispatch


def _dispatch(patch: Patch, change: Callable[[Arrived], Arrived]) -> None:
    original = AllToAll.__call__

    def call(self: AllToAll, rows_RD: Tensor, counts_E: Tensor) -> Arrived:
        return change(original(self, rows_RD, counts_E))

    patch.setattr(AllToAll, "__call__", call)


@mutant(TWO)
def rows_not_brought_into_the_experts_order(patch: Patch, _rank: int) -> None:
    patch.setattr(all_to_all, "by_expert", lambda counts_PE: torch.arange(int(counts_PE.sum())))


@mutant(TWO)
def that_order_not_undone(patch: Patch, _rank: int) -> None:
    patch.setattr(all_to_all, "undone", lambda order: torch.arange(len(order)))


@mutant(TWO)
def counts_of_the_next_expert(patch: Patch, _rank: int) -> None:
    _dispatch(patch, lambda came: replace(came, counts=came.counts[1:] + came.counts[:1]))


@mutant(TWO)
def counts_off_by_one(patch: Patch, _rank: int) -> None:
    def change(came: Arrived) -> Arrived:
        first, second, *rest = came.counts
        moved = min(1, first)
        return replace(came, counts=(first - moved, second + moved, *rest))

    _dispatch(patch, change)


@mutant(TWO)
def outputs_a_row_late(patch: Patch, _rank: int) -> None:
    _dispatch(
        patch,
        lambda came: replace(came, combine=lambda outputs: came.combine(outputs.roll(1, dims=0))),
    )


@mutant(TWO)
def gradients_stay_where_the_experts_are(patch: Patch, _rank: int) -> None:
    original = all_to_all._Exchange.backward

    def backward(ctx: Any, *grads: Any) -> Any:
        back, *rest = original(ctx, *grads)
        first = sum(ctx.sent[: ctx.world.coordinate("ep")])
        own = slice(first, first + ctx.sent[ctx.world.coordinate("ep")])
        kept = torch.zeros_like(back)
        kept[own] = back[own]
        return kept, *rest

    patch.setattr(all_to_all._Exchange, "backward", staticmethod(backward))


# What ranks hold


@mutant(TWO)
def experts_of_the_other_rank(patch: Patch, _rank: int) -> None:
    original = World.coordinate

    def coordinate(self: World, axis: str) -> int:
        found = original(self, axis)
        return self.degree("ep") - 1 - found if axis == "ep" else found

    def split(*arguments: Any, **options: Any) -> SplitExperts:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(World, "coordinate", coordinate)
            return experts.split_experts(*arguments, **options)

    patch.setattr(apply_module, "split_experts", split)


@mutant(REPLICAS)
def gradients_of_experts_not_summed_over_replicas(patch: Patch, _rank: int) -> None:
    patch.setattr(experts, "REPLICAS", ("dp_replicate",))


@mutant(TWO)
def gradients_of_experts_summed_over_other_experts(patch: Patch, _rank: int) -> None:
    patch.setattr(experts, "REPLICAS", ("dp_replicate", "ep_replicate", "ep"))


@mutant(TWO)
def experts_left_to_the_data_ranks(patch: Patch, _rank: int) -> None:
    original = DataParallel.__init__

    def init(self: DataParallel, *arguments: Any) -> None:
        original(self, *arguments)
        self.apart = frozenset()

    patch.setattr(DataParallel, "__init__", init)


@mutant(ROWS)
def experts_left_to_the_tensor_ranks(patch: Patch, _rank: int) -> None:
    patch.setattr(apply_module.SplitDecoder, "without", lambda self, _names: self)


@mutant(TWO)
def copies_counted_in_the_norm(patch: Patch, _rank: int) -> None:
    def among(self: SplitExperts, places: Any, _axes: Any) -> dict[str, Place]:
        return dict(places) | dict(self.places)

    patch.setattr(SplitExperts, "among", among)


@mutant(REPLICAS)
def copies_of_experts_counted_in_the_norm(patch: Patch, _rank: int) -> None:
    original = experts._place

    def place(shape: tuple[int, ...], world: World) -> Place:
        found = original(shape, world)
        return replace(found, owned=found.box)

    patch.setattr(experts, "_place", place)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
