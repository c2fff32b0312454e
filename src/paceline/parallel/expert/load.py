"""The load of experts over all ranks, and which of their tokens are whose."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from paceline.dist.world import World
from paceline.models.balance import Balance, sequences_of
from paceline.models.decoder import Decoder
from paceline.models.layout import PADDING, Layout
from paceline.models.moe import MixtureOfExperts
from paceline.plan.batch import batch_shape
from paceline.plan.mesh import AXES
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan

LOAD = "expert load"
BALANCE = "balance loss"


class ExpertLoad:
    """What the layers with experts have seen, on all ranks.

    Args:
        spec: of the whole model.
        balances: of the layers that are here.
        world: the ranks.
        has_loss: whether they compute a balance loss.
    """

    def __init__(
        self, spec: ModelSpec, balances: Mapping[int, Balance], world: World, *, has_loss: bool
    ) -> None:
        self._layers = [layer for layer in range(spec.num_layers) if spec.has_experts(layer)]
        self._num_experts = spec.moe.num_experts if spec.moe else 0
        self._balances = balances
        self._world = world
        self._has_loss = has_loss

    def statistics(self) -> dict[str, float]:
        """Of the passes since it was last asked; the same on every rank.

        Returns:
            ``expert_load``: tokens of the busiest expert over the mean of its layer, in the layer
            where that is worst; ``balance_loss``, where there is one: the sum over layers of its
            mean over sequences.

        Comm: an all-reduce of E + 2 numbers of each layer over all ranks.
        """
        totals_LN = torch.zeros(
            len(self._layers), self._num_experts + 2, dtype=torch.float64, device=self._world.device
        )
        for row_N, layer in zip(totals_LN, self._layers, strict=True):
            if layer in self._balances:
                load = self._balances[layer].take(self._world.device)
                row_N.copy_(
                    torch.cat([load.counts_E, load.loss_sum[None], load.num_sequences[None]])
                )
        self._world.sum(totals_LN, AXES, purpose=LOAD)
        counts_LE, losses_L, sequences_L = totals_LN[:, :-2], totals_LN[:, -2], totals_LN[:, -1]
        busiest_L = counts_LE.amax(dim=1) / counts_LE.mean(dim=1).clamp(min=1e-9)
        found = {"expert_load": busiest_L.max().item()}
        if self._has_loss:
            found["balance_loss"] = (losses_L / sequences_L.clamp(min=1e-9)).sum().item()
        return found


def watch_experts(model: Decoder, spec: ModelSpec, plan: Plan, world: World) -> ExpertLoad | None:
    """Has the experts of a model watched in training, and their load pulled level.

    Args:
        model: the whole one, or some blocks of it.
        spec: of the whole model.
        plan: the weight of the balance loss, and which ranks have tokens of one sequence.
        world: the ranks.

    Returns:
        None for a model without experts.
    """
    if spec.moe is None:
        return None
    # Each of these axes holds other tokens of the same sequences.
    splits_rows = world.degree("tp") > 1 and plan.tensor.sequence_parallel
    axes = ("cp", "tp") if splits_rows else ("cp",)
    scale = plan.expert.balance_loss_weight / batch_shape(plan).sequences_per_step
    balances: dict[int, Balance] = {}
    for layer, block in enumerate(model.blocks):
        mixture = getattr(block, "ffn", None)
        if isinstance(mixture, MixtureOfExperts):
            mixture.balance = balances[layer] = Balance(
                spec.moe.num_experts,
                spec.moe.experts_per_token,
                scale=scale,
                sequences=partial(_own_sequences, world=world) if splits_rows else sequences_of,
                sum_up=partial(world.sum, axes=axes, purpose=BALANCE),
            )
    return ExpertLoad(spec, balances, world, has_loss=scale > 0)


def _own_sequences(layout: Layout, *, world: World) -> Tensor:
    """Of a tensor rank's rows of the tokens, the last of which may be padding of their number."""
    index_R, degree = sequences_of(layout), world.degree("tp")
    padded_R = functional.pad(index_R, (0, -len(index_R) % degree), value=PADDING)
    return padded_R.chunk(degree)[world.coordinate("tp")]
