"""All that a checkpoint holds: parameters, optimizer state, and the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.optim.parts import Part
from paceline.parallel.apply import ParallelModel
from paceline.plan.declared import Declared, declare_decoder
from paceline.plan.layout import Place
from paceline.plan.model_spec import ModelSpec


@dataclass(slots=True)
class State:
    """A run between two steps. The data cursor and all randomness follow from `step`.

    Attributes:
        model: the model on this rank.
        optimizer: with its state in place.
        step: optimizer steps taken.
    """

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    def parts(self) -> dict[str, Part]:
        """Everything that this rank holds, by name, sharing memory with the live state.

        Where fine-tuning has added parameters, these alone: the model's own are as MODEL has them.
        """
        named: dict[str, Part] = {}
        for name, (parameter, place) in self.model.parts.items():
            if self.model.added and name not in self.model.added:
                continue
            named[f"model.{name}"] = Part(parameter.detach(), place)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                # Moments lie as their parameter does; the counter of steps is a scalar.
                lies = place if value.ndim else Place.of_whole(())
                named[f"optimizer.{name}.{key}"] = Part(value, lies)
        return named

    def declared(self, spec: ModelSpec) -> dict[str, Declared]:
        """What tensors of the whole run are made of, by the names that `parts` gives them.

        Moments are made as their parameter is; that a counter is not, its dimensions tell.

        Args:
            spec: of the whole model, of which this rank may have a part.
        """
        keys = {key for state in self.optimizer.state.values() for key in state}
        of_parameters = declare_decoder(spec)
        named = {f"model.{name}": declared for name, declared in of_parameters.items()}
        for key in keys:
            named |= {f"optimizer.{name}.{key}": d for name, d in of_parameters.items()}
        return named
