"""Where a model's weights come from, parameter by parameter, and how they get into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paceline.core import rng
from paceline.models.decoder import Decoder
from paceline.plan.model_spec import ModelSpec


class Weights(Protocol):
    """A source of weights under our parameter names."""

    def read(self, name: str) -> Tensor:
        """The whole parameter, on the CPU, in the dtype that it is kept in."""
        ...


class TensorWeights:
    """Weights that are in memory.

    Args:
        tensors: name to the whole parameter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class RandomWeights:
    """Seeded weights: normal matrices, unit norms and scales, zero biases.

    They are functions of seed and name.

    Args:
        spec: sizes; ``initializer_std`` is the standard deviation.
        seed: two seeds share no bits.
    """

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self._spec = spec
        self._seed = seed
        self._shapes = {name: p.shape for name, p in build(spec).named_parameters()}

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith(".bias"):
            return torch.zeros(shape)
        if "norm" in name.split(".")[-2]:
            return torch.full(shape, 1.0 - self._spec.norm_offset)
        if name.endswith(".expert_scales"):
            return torch.ones(shape)
        draws = rng.normal(shape.numel(), seed=self._seed, purpose="initialise", stream=name)
        values = (draws * self._spec.initializer_std).astype(np.float32)
        return torch.from_numpy(values).view(shape)


def build(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder without memory behind its parameters (on the meta device)."""
    with torch.device("meta"), _NoInitialisation():
        return Decoder(spec).to(dtype)


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device it fills nothing, yet torch imports its compiler
    for it, which costs every command a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **kwargs or {})


def copy_whole(_name: str, parameter: nn.Parameter, value: Tensor) -> None:
    """Puts a weight into a parameter that is not split."""
    parameter.copy_(value)


@torch.no_grad()
def fill(
    model: nn.Module,
    weights: Weights,
    device: torch.device,
    *,
    put: Callable[[str, nn.Parameter, Tensor], None] = copy_whole,
) -> None:
    """Gives a model of the meta device memory on `device` and its weights.

    Args:
        put: how a weight of a name gets into its parameter, where parameters are split over ranks.
    """
    for prefix, module in model.named_modules():
        # One module at a time: where `put` keeps a part alone, the whole model is never there.
        module.to_empty(device=device, recurse=False)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            put(name, parameter, weights.read(name))
