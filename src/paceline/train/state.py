"""All that a checkpoint holds: parameters, optimizer state, and the step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.parallel.apply import ParallelModel


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

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, sharing memory with the live state.

        Where fine-tuning has added parameters, these alone: the model's own are as MODEL has them.
        """
        named: dict[str, Tensor] = {}
        for name, parameter in self.model.module.named_parameters():
            if self.model.added and name not in self.model.added:
                continue
            named[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                named[f"optimizer.{name}.{key}"] = value
        return named
