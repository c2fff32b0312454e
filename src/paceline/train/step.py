"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paceline.core.errors import PacelineError
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.optim.scale import LossScale, clip, global_norm
from paceline.train.objective.base import Objective
from paceline.train.state import State


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step did; the same on every rank.

    Attributes:
        loss: mean over the step's valid tokens.
        grad_norm: norm of the whole gradient before the clip.
        clip_factor: what the gradient was multiplied by.
        valid_tokens: tokens that had a loss, over all ranks.
    """

    loss: float
    grad_norm: float
    clip_factor: float
    valid_tokens: int


def train_step(
    state: State,
    batches: Sequence[Batch],
    objective: Objective,
    world: World,
    *,
    learning_rate: float,
    max_norm: float,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Accumulates the gradient over this rank's micro-batches and moves the weights.

    Until `before_update` has returned, parameters and optimizer state are as they were.
    """
    result = compute_gradients(state, batches, objective, world, max_norm=max_norm)
    if before_update is not None:
        before_update()
    move_weights(state, learning_rate)
    return result


def move_weights(state: State, learning_rate: float) -> None:
    """Takes the step that the gradients in the parameters ask for, and forgets them."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.model.finish_update()
    state.step += 1


def compute_gradients(
    state: State,
    batches: Sequence[Batch],
    objective: Objective,
    world: World,
    *,
    max_norm: float,
) -> StepResult:
    """Leaves the clipped gradient of the step's mean loss in the parameters.

    Raises:
        PacelineError: a gradient that is not finite; no weight has moved.
    """
    model = state.model
    scale = LossScale(sum(batch.count for batch in batches), world)
    loss_sum = model.passes.train(batches, objective, scale.scaled)
    model.finish_gradients()
    parts = list(model.parts.values())
    norm = global_norm(parts, model.spread_axes, world)
    if not math.isfinite(norm):
        hint = "a lower optimizer.lr, or resume from a checkpoint before it"
        raise PacelineError(f"step {state.step + 1}: the gradient's norm is {norm}", hint=hint)
    return StepResult(
        loss=scale.mean_loss(loss_sum),
        grad_norm=norm,
        clip_factor=clip(parts, norm, max_norm),
        valid_tokens=scale.count,
    )
