"""Which parameters an optimizer moves, and which of them decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from paceline.plan.plan import OptimizerConfig


def parameter_groups(parameters: Iterable[Tensor], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trained parameters in groups: matrices, which decay, and vectors, which do not.

    Those that torch shards are apart from plain ones: fused updates take one kind at a time.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    kinds = (False, True)
    matrices = [[p for p in trained if p.ndim >= 2 and _is_sharded(p) == kind] for kind in kinds]
    vectors = [[p for p in trained if p.ndim < 2 and _is_sharded(p) == kind] for kind in kinds]
    groups = [
        *({"params": group, "weight_decay": config.weight_decay} for group in matrices),
        *({"params": group, "weight_decay": 0.0} for group in vectors),
    ]
    # A rank of a pipeline may hold frozen parameters alone; torch wants a group even then.
    return [group for group in groups if group["params"]] or groups[:1]


def _is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)
