"""The contract of data parallelism."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from paceline.dist.world import World
from paceline.models.decoder import Decoder
from paceline.plan.plan import PrecisionConfig


class DataParallel(ABC):
    """How data ranks share parameters and gradients.

    Gradients are summed over ranks, never averaged: their scale has one owner
    (`paceline.optim.scale`).

    Args:
        world: the ranks.
        precision: dtypes of compute and of the reduction.
    """

    split_axes: tuple[str, ...] = ()
    """Mesh axes over which parameters and gradients are split after `wrap`."""

    def __init__(self, world: World, precision: PrecisionConfig) -> None:
        self.world = world
        self.precision = precision

    @abstractmethod
    def wrap(self, model: Decoder) -> None:
        """Changes a model of the meta device in place, before it has memory."""

    @abstractmethod
    def put(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Gives a parameter its value, or this rank's part of it."""

    @abstractmethod
    def finish_gradients(self, model: Decoder) -> None:
        """Called after the last backward of a step; then gradients are whole sums."""

    @abstractmethod
    def finish_evaluation(self, model: Decoder) -> None:
        """Called after forward passes that no backward pass follows."""
