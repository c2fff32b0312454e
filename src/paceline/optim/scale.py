"""The one owner of loss and gradient scale.

The gradient of a step is that of the mean loss over its valid tokens, whatever rank and
micro-batch they are on:

    gradient = sum over ranks and micro-batches of d(loss sum) / d(weights) / count

where `count` is the number of valid tokens of the whole step. So every backward pass runs on
``loss sum / count``, and gradients are summed over ranks and micro-batches, never averaged.
Nothing else in this package scales a loss or a gradient, but for the clip below and for
`global_mean`, which serves loops of users, where gradients are averaged over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed
from torch import Tensor

from paceline.core.errors import DataError
from paceline.dist.world import World
from paceline.optim.parts import Part
from paceline.plan.mesh import DATA_AXES


class LossScale:
    """Scales the losses of one step.

    Args:
        local_count: valid tokens of this rank's micro-batches of the step, of whole sequences.
        world: to sum the counts over.

    Raises:
        DataError: no rank has a valid token.
    """

    def __init__(self, local_count: int, world: World) -> None:
        self._world = world
        total = torch.tensor(float(local_count), dtype=torch.float64, device=world.device)
        self.count = int(world.sum(total, DATA_AXES, purpose="token count").item())
        if self.count == 0:
            raise DataError("a step without a single valid token", hint="is the data empty?")

    def scaled(self, loss_sum: Tensor) -> Tensor:
        """What backward runs on for one micro-batch."""
        return loss_sum / self.count

    def mean_loss(self, local_sum: Tensor) -> float:
        """The mean loss of the step, the same on every rank.

        Args:
            local_sum: sum of the losses of this rank's micro-batches, float64: of its part of
                their tokens where ranks share sequences, 0 on the ranks of a pipeline that do not
                see the loss.
        """
        axes = ("pp", *DATA_AXES, "cp")
        return self._world.sum(local_sum, axes, purpose="loss").item() / self.count


def global_mean(loss_sum: Tensor, count: int) -> Tensor:
    """The mean loss over all ranks' tokens, for a loop in which gradients are averaged over ranks,
    as `paceline.parallelize`, torch's ``DistributedDataParallel`` and ``fully_shard`` do.

    A mean of each rank's mean would weigh the tokens of a rank with few of them more. Every rank
    calls this for each of its micro-batches: it sums over ranks.

    Args:
        loss_sum: sum of the losses of this rank's micro-batch, with its graph.
        count: tokens with a loss of all of this rank's micro-batches of the step.

    Returns:
        What backward runs on. Summed over the step's micro-batches its value is the step's mean
        loss, the same on every rank; its averaged gradients are those of that mean.

    Raises:
        DataError: no rank has a token with a loss.
    """
    totals = torch.tensor(
        [loss_sum.item(), float(count)], dtype=torch.float64, device=loss_sum.device
    )
    num_ranks = 1
    if torch.distributed.is_initialized():
        num_ranks = torch.distributed.get_world_size()
        torch.distributed.all_reduce(totals)
    total_sum, total_count = totals.tolist()
    if total_count == 0:
        raise DataError("a step without a single valid token", hint="is the data empty?")
    share = loss_sum * (num_ranks / total_count)
    return share + (total_sum / total_count - share).detach()


@torch.no_grad()
def global_norm(parts: Iterable[Part], spread_axes: Sequence[str], world: World) -> float:
    """The norm of the whole gradient, the same on every rank.

    Args:
        parts: of the parameters; those without a gradient are left out.
        spread_axes: mesh axes over which parameters are spread. Along these, each element is
            counted by its owner alone.
        world: to sum the squares over.
    """
    gradients = [part.owned_gradient for part in parts]
    gradients = [gradient for gradient in gradients if gradient is not None]
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for norm in norms:
        total += norm.double().square()
    return math.sqrt(world.sum(total, tuple(spread_axes), purpose="gradient norm").item())


@torch.no_grad()
def clip(parts: Iterable[Part], norm: float, max_norm: float) -> float:
    """Scales gradients in place so that their norm is at most `max_norm`; 0 means no bound.

    Returns:
        The factor, 1.0 where nothing was clipped.
    """
    factor = max_norm / norm if 0 < max_norm < norm else 1.0
    if factor != 1.0:
        for part in parts:
            if part.gradient is not None:
                part.gradient.mul_(factor)
    return factor
