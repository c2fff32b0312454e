"""How far a run has come: what a checkpoint says of that beside its tensors, and what has to stay.

There is no hidden state. Which rows a step reads, their order and every random draw are functions
of the seed and the step; what is written down here is enough to go on, and to notice an order that
is another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from paceline.checkpoint.manifest import Progress
from paceline.core.errors import UsageError
from paceline.data.sources import parse_source
from paceline.plan.plan import Plan
from paceline.train.run import RunConfig

_NOT_SETTINGS = ("params", "foreach", "fused", "capturable", "differentiable", "maximize")


def progress_of(
    step: int, plan: Plan, config: RunConfig, optimizer: torch.optim.Optimizer
) -> Progress:
    """What a checkpoint of a run says after `step` steps.

    Args:
        step: optimizer steps taken.
        plan: the one in force.
        config: with the identities of its data.
        optimizer: of this rank.
    """
    order = order_of(plan, config)
    rows = step * order["rows_per_step"]
    seed = plan.train.seed
    return Progress(
        cursor={
            "steps": step,
            "rows": rows,
            "tokens": rows * plan.train.sequence_length,
            "order": order,
        },
        streams={
            "seed": seed,
            "step": step,
            "rows": rows,
            "rule": "every draw is a function of seed, purpose, stream and position, which follow "
            "from seed and step; no generator has a state",
        },
        optimizer={"name": plan.optimizer.name, "groups": _settings(optimizer)},
    )


def order_of(plan: Plan, config: RunConfig) -> dict[str, Any]:
    """All that the order of rows follows from, and their content."""
    train = plan.train
    weights = [parse_source(text)[1] for text in config.sources]
    identities = config.data_identity[: len(weights)]
    return {
        "seed": train.seed,
        "sequence_length": train.sequence_length,
        "rows_per_step": train.tokens_per_step // train.sequence_length,
        "pack": train.pack,
        "long_documents": train.long_documents,
        "sources": [
            {"identity": identity, "weight": weight}
            for identity, weight in zip(identities, weights, strict=True)
        ],
    }


def require_same_order(
    checkpoint: Path, progress: Progress | None, plan: Plan, config: RunConfig
) -> None:
    """Raises UsageError if a run would read other rows than it would have without the break.

    Args:
        checkpoint: for the message.
        progress: what the checkpoint says; of format 1 nothing, and then nothing is refused.
        plan: of the run that goes on.
        config: of the run that goes on, with the identities of its data.
    """
    if progress is None:
        return
    now, before = order_of(plan, config), progress.cursor["order"]
    for key, value in before.items():
        if now.get(key) != value:
            raise UsageError(
                f"{checkpoint} has read rows in an order of which {key} is {value}, but now it is "
                f"{now.get(key)}: the data would not go on where it stopped",
                hint="resume with the data and the [train] table of the run, or start a new run",
            )


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of parameter groups, each once; ranks may split a group."""
    found: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
        if settings not in found:
            found.append(settings)
    return found
