"""The loss on held-out data, without a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

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
    model: ParallelModel,
    batches: Iterable[Batch],
    objective: Objective,
    world: World,
    *,
    num_microbatches: int = 1,
) -> Evaluation:
    """The mean loss over all ranks' batches, every token weighing the same.

    Args:
        model: in training mode; so it is left.
        batches: this rank's; as many on every rank.
        objective: gives the sums of losses.
        world: the ranks.
        num_microbatches: batches that go through a pipeline together.

    Raises:
        DataError: no token has a loss.
        PacelineError: the loss is not finite.
    """
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.module.eval()
    waiting = iter(batches)
    while several := list(islice(waiting, num_microbatches)):
        total[0] += model.passes.evaluate(several, objective)
        total[1] += sum(batch.count for batch in several)
    model.finish_evaluation()
    model.module.train()
    # The last stage alone has seen it, and each rank of a sequence its part of it.
    world.sum(total[:1], ("pp", "cp"), purpose="held-out loss")
    loss_sum, count = world.sum(total, DATA_AXES, purpose="held-out loss").tolist()
    if count == 0:
        raise DataError("the held-out rows have no valid token", hint="give more --eval-data")
    if not math.isfinite(loss_sum):
        raise PacelineError(f"the loss on held-out data is {loss_sum / count}")
    return Evaluation(loss_sum / count, int(count))
