"""The loss on held-out data, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from paceline.core.errors import DataError, PacelineError
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.parallel.apply import ParallelModel
from paceline.plan.mesh import DATA_AXES
from paceline.train.objective.base import Objective

_MAX_EXPONENT = 700.0  # e to the power of more is no float64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts held-out data; the same on every rank.

    Attributes:
        loss: mean over the valid tokens.
        tokens: valid tokens, over all ranks.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, _MAX_EXPONENT))


@torch.no_grad()
def evaluate(
    model: ParallelModel, batches: Iterable[Batch], objective: Objective, world: World
) -> Evaluation:
    """The mean loss over all ranks' batches, every token weighing the same.

    Args:
        model: in training mode; so it is left.
        batches: this rank's; as many on every rank.
        objective: gives the sums of losses.
        world: the ranks.

    Raises:
        DataError: no token has a loss.
        PacelineError: the loss is not finite.
    """
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.module.eval()
    for batch in batches:
        total[0] += objective(model.module, batch.to(world.device))
        total[1] += batch.count
    model.finish_evaluation()
    model.module.train()
    loss_sum, count = world.sum(total, DATA_AXES, purpose="held-out loss").tolist()
    if count == 0:
        raise DataError("the held-out rows have no valid token", hint="give more --eval-data")
    if not math.isfinite(loss_sum):
        raise PacelineError(f"the loss on held-out data is {loss_sum / count}")
    return Evaluation(loss_sum / count, int(count))
