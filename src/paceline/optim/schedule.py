"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from paceline.plan.plan import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """The learning rate of a step.

    Rises linearly over the warm-up to `lr` at step `warmup_steps`, then decays as
    ``schedule.kind`` says to ``final_fraction * lr`` at the last step.

    Args:
        step: from 1 to `num_steps`.
        num_steps: steps of the whole run.
    """
    schedule = config.schedule
    if step <= schedule.warmup_steps:
        return config.lr * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return config.lr
    span = max(1, num_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    shape = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (schedule.final_fraction + (1 - schedule.final_fraction) * shape)
