"""What is done with a method: it is attached to a model, or merged into its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from paceline.core.errors import UsageError
from paceline.models.decoder import Decoder
from paceline.models.peft import PEFT
from paceline.models.peft.base import Method, Origin
from paceline.models.weights import Weights, build
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig


@dataclass(frozen=True, slots=True)
class Attached:
    """A model that something has been added to.

    Attributes:
        weights: of the model's own parameters and of the new ones.
        added: names of the new parameters, the only ones that are trained; empty where nothing
            was added.
    """

    weights: Weights
    added: frozenset[str]


def method_of(config: PeftConfig) -> Method:
    """The method that a plan names."""
    return PEFT.load(config.method)(config)


def attach(
    model: Decoder,
    config: PeftConfig,
    weights: Weights,
    *,
    seed: int = 0,
    added: Weights | None = None,
) -> Attached:
    """Adds what a method adds to a model of the meta device, and freezes what was there.

    Args:
        model: changed in place.
        config: the method and its sizes.
        weights: the model's own.
        seed: of the new parameters' start values.
        added: values of the new parameters; absent: the method's start values.

    Raises:
        ConfigError: a target that matches nothing.
    """
    method, own = method_of(config), dict(model.named_parameters())
    method.attach(model)
    new = {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in own
    }
    if not new:
        return Attached(weights, frozenset())
    for parameter in own.values():
        parameter.requires_grad_(False)
    values = added or _StartValues(method, new, Origin(model.spec, weights, seed))
    return Attached(_Joined(weights, values, frozenset(new)), frozenset(new))


class MergedWeights:
    """A model's own weights, with what was added worked into them.

    Args:
        spec: sizes of the model.
        config: the method of the new parameters.
        base: the model's own weights.
        added: the new parameters.

    Raises:
        UsageError: a method whose parameters cannot become part of the model's.
    """

    def __init__(self, spec: ModelSpec, config: PeftConfig, base: Weights, added: Weights) -> None:
        self._method = method_of(config)
        if reason := self._method.why_unmerged:
            raise UsageError(f"peft.method = {config.method} cannot be merged: {reason}")
        self._targets = frozenset(self._method.targets(build(spec)))
        self._base, self._added = base, added

    def read(self, name: str) -> Tensor:
        value = self._base.read(name)
        module, _, kind = name.rpartition(".")
        if module not in self._targets:
            return value
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return self._method.merge(kind, wide, module, self._added)


class _StartValues:
    """The values that new parameters begin with."""

    def __init__(
        self, method: Method, shapes: Mapping[str, tuple[int, ...]], origin: Origin
    ) -> None:
        self._method, self._shapes, self._origin = method, shapes, origin

    def read(self, name: str) -> Tensor:
        return self._method.start(name, self._shapes[name], self._origin)


class _Joined:
    """A model's own weights and the new parameters."""

    def __init__(self, base: Weights, added: Weights, names: frozenset[str]) -> None:
        self._base, self._added, self._names = base, added, names

    def read(self, name: str) -> Tensor:
        return (self._added if name in self._names else self._base).read(name)
