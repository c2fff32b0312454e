"""Which parameters an optimizer moves, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from paceline.plan.plan import OptimizerConfig


def parameter_groups(parameters: Iterable[Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices, which decay, and vectors, which do not."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # A rank of a pipeline may hold frozen parameters alone; torch wants a group even then.
    return [group for group in groups if group["params"]] or groups[:1]
