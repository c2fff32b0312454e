"""Experts shared out over ranks: every row of a token goes to the rank that holds its expert.

Source: Lepikhin et al., GShard, arXiv:2006.16668, Sec. 3.3 (dispatch and combine as all-to-alls).
Replaces: nothing, it is the default.  Needs: mesh.ep > 1, a model with experts;
    tensor.sequence_parallel where mesh.tp > 1.
Forbids: peft, train.compile.
Cost: weights, gradients and optimizer state of experts / ep a rank. Every layer and micro-batch
    sends, of a rank's rows, those that leave it, and brings back what the experts make of them; the
    backward pass does the same with gradients.
Differs: no capacity and no auxiliary padding: no token is dropped, counts of rows go ahead. Experts
    are shared out by ep alone, neither split by tp nor sharded by ZeRO: a larger ep divides their
    state further.

Traffic of a layer and a micro-batch, forward and backward together: 2 (o + i) D numbers of the
compute dtype for o rows that leave this rank, of the k rows of each of its tokens, and i that come
from others; and E (ep - 1) / ep counts of 8 bytes. Where blocks are computed again, their forward
part once more. Of a step, this rank's gradients of experts in an all-reduce over dp_replicate and
the ranks that hold the same experts (ep_replicate).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paceline.dist.world import World
from paceline.models.dispatch import Arrived

AXIS = "ep"
ROWS = "expert rows"
COUNTS = "expert counts"


class AllToAll:
    """A `paceline.models.dispatch.Dispatch` over the `ep` axis.

    Rank r of p holds the experts from ``r E / p`` to ``(r + 1) E / p``.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, rows_RD: Tensor, counts_E: Tensor) -> Arrived:
        sent_PE = counts_E.view(self._world.degree(AXIS), -1)
        each = [1] * len(sent_PE)
        received_PE = self._world.all_to_all(sent_PE, AXIS, each, each, purpose=COUNTS)
        sent, received = sent_PE.sum(dim=1).tolist(), received_PE.sum(dim=1).tolist()
        order = by_expert(received_PE)

        def combine(outputs_RD: Tensor) -> Tensor:
            return _Exchange.apply(outputs_RD[undone(order)], self._world, received, sent)

        arrived_RD = _Exchange.apply(rows_RD, self._world, sent, received)
        return Arrived(arrived_RD[order], tuple(received_PE.sum(dim=0).tolist()), combine)


def by_expert(counts_PE: Tensor) -> Tensor:
    """The order in which rows that lie by rank, and for each rank by expert, lie by expert alone.

    Args:
        counts_PE: rows from each rank for each expert.
    """
    num_ranks, num_experts = counts_PE.shape
    experts = torch.arange(num_experts, device=counts_PE.device).repeat(num_ranks)
    return experts.repeat_interleave(counts_PE.flatten()).argsort(stable=True)


def undone(order: Tensor) -> Tensor:
    """The order that puts rows back which were taken in another."""
    return order.argsort()


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, and in the backward pass their gradients to where they were."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, world: World, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.world, ctx.sent, ctx.received = world, sent, received
        return world.all_to_all(rows_RD, AXIS, sent, received, purpose=ROWS)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:
        back = ctx.world.all_to_all(grad_outputs[0], AXIS, ctx.received, ctx.sent, purpose=ROWS)
        return back, None, None, None
