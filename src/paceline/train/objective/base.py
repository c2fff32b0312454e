"""The contract of objectives."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from paceline.data.batch import Batch


class Objective(Protocol):
    """The loss of a micro-batch.

    Args:
        model: called as the plain model.
        batch: on the model's device.

    Returns:
        What the model's head makes of the batch, as it is: the sum of the losses over the batch's
        valid tokens, at least in float32. A stage of a pipeline that has no head gives hidden
        states in its place. The scale is not its business: `paceline.optim.scale` divides by the
        tokens of the whole step.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor: ...
