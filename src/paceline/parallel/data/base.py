"""The contract of data parallelism."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from paceline.dist.world import World
from paceline.kernels.device import choose_dtype
from paceline.models.decoder import Decoder
from paceline.optim.parts import Part
from paceline.plan.layout import Place
from paceline.plan.plan import PrecisionConfig


class DataParallel(ABC):
    """How data ranks share parameters and gradients.

    Gradients are summed over ranks, never averaged: their scale has one owner
    (`paceline.optim.scale`).

    Args:
        world: the ranks.
        precision: dtypes of compute and of the reduction.
        apart: names of parameters that are not shared so: every rank holds what it has of them as
            it is, and their gradients are summed elsewhere.
    """

    spread_axes: tuple[str, ...] = ()
    """Mesh axes over which the parts that `hold` gives are spread."""

    def __init__(
        self, world: World, precision: PrecisionConfig, apart: frozenset[str] = frozenset()
    ) -> None:
        self.world = world
        self.precision = precision
        self.apart = apart

    @property
    def reduce_dtype(self) -> torch.dtype:
        """In which gradients are summed over ranks."""
        return choose_dtype(self.precision.reduce, self.world.device)

    def on_ready(self, parameter: Tensor) -> None:  # noqa: B027
        """Told of a gradient that something other than autograd has put into `parameter.grad`.

        Autograd's are found without it. What waits for the end of the step has nothing to do.
        """

    @abstractmethod
    def wrap(self, model: Decoder) -> None:
        """Changes a model of the meta device in place, before it has memory."""

    @abstractmethod
    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        """Gives a parameter its value, or this rank's part of it."""

    @abstractmethod
    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        """What this rank moves and saves of each parameter; called once, after `put`.

        Args:
            model: with its weights.
            places: where this model's parameters lie in the whole one's.
        """

    def run_stage(self, run: Callable[[], Tensor], is_first: bool) -> Tensor:  # noqa: ARG002
        """Runs the forward pass of a stage that is not called as a model.

        Args:
            run: calls parts of the model; gives the stage's output.
            is_first: whether it looks tokens up.
        """
        return run()

    def run_words(self, run: Callable[[], None], weight: nn.Parameter) -> None:  # noqa: ARG002
        """Runs a pass of a vocabulary that is in no stage.

        Args:
            run: the pass.
            weight: the one matrix whose values it reads, and does not keep.
        """
        run()

    @abstractmethod
    def finish_pass(self, model: Decoder) -> None:
        """Called after every backward pass, or part of one, of one stage and micro-batch."""

    @abstractmethod
    def finish_gradients(self, model: Decoder) -> None:
        """Called after the last backward of a step; then gradients of parts are sums over ranks."""

    @abstractmethod
    def finish_update(self, model: Decoder) -> None:
        """Called after the optimizer has moved the parts, or a checkpoint has filled them; then
        the model is ready for a pass.
        """

    @abstractmethod
    def finish_evaluation(self, model: Decoder) -> None:
        """Called after forward passes that no backward pass follows."""
