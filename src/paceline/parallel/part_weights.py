"""The weights of a rank's part of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from paceline.models.weights import Weights
from paceline.plan.layout import Place


class PartWeights:
    """Of each parameter what a rank has.

    Args:
        whole: the weights.
        places: where this rank's parts lie in them.
    """

    def __init__(self, whole: Weights, places: Mapping[str, Place]) -> None:
        self._whole = whole
        self._places = places

    def read(self, name: str) -> Tensor:
        return self._whole.read(name)[self._places[name].box.slices]
