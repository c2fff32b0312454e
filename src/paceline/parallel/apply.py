"""Parallelism applied to a plain model, in one fixed order.

peft -> freeze -> (later: pp, tp and ep, cp, remat) -> compile -> data -> memory and weights
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from paceline.core.errors import ConfigError, Problem
from paceline.dist.world import World
from paceline.kernels.device import choose_dtype
from paceline.models.decoder import Decoder
from paceline.models.peft.attach import attach
from paceline.models.weights import Weights, build, fill
from paceline.optim.parts import Part
from paceline.parallel.data import STAGES
from paceline.parallel.data.base import DataParallel
from paceline.plan.layout import Place
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class ParallelModel:
    """A model laid over the ranks of a world.

    Attributes:
        module: this rank's part; call it as the plain model.
        data: how data ranks share its state.
        parts: what this rank holds of each parameter.
        added: names of the parameters that fine-tuning has added, if it has: the only ones that
            are trained and saved.
    """

    module: Decoder
    data: DataParallel
    parts: dict[str, Part]
    added: frozenset[str] = frozenset()

    @property
    def spread_axes(self) -> tuple[str, ...]:
        """Mesh axes over which parameters are spread."""
        return self.data.spread_axes

    def parameters(self) -> list[Tensor]:
        """What optimizers move: the parts, frozen ones among them."""
        return [part.tensor for part in self.parts.values()]


def apply(
    spec: ModelSpec, weights: Weights, plan: Plan, world: World, *, added: Weights | None = None
) -> ParallelModel:
    """Builds a model on this rank as the plan says, with its weights.

    Args:
        spec: sizes of the model.
        weights: of the model.
        plan: how.
        world: the ranks.
        added: values of what fine-tuning adds; absent: its method's start values.

    Raises:
        ConfigError: a pattern that matches nothing.
    """
    model = build(spec, choose_dtype(plan.precision.params, world.device))
    model.compute_dtype = choose_dtype(plan.precision.compute, world.device)
    attached = attach(model, plan.peft, weights, seed=plan.train.seed, added=added)
    freeze(model, plan.train.freeze)
    if is_compiled(plan, world.device):
        for block in model.blocks:
            block.compile()
    places = {n: Place.of_whole(tuple(p.shape)) for n, p in model.named_parameters()}
    data: DataParallel = STAGES.load(plan.zero_technique)(world, plan.precision)
    data.wrap(model)
    fill(model, attached.weights, world.device, put=data.put)
    return ParallelModel(model, data, data.hold(model, places), attached.added)


def is_compiled(plan: Plan, device: torch.device) -> bool:
    """Whether blocks are compiled on a device; for float64, which proves plans, only when told."""
    if plan.train.compile != "auto":
        return plan.train.compile == "on"
    return device.type == "cuda" and plan.precision.compute != "float64"


def freeze(model: Decoder, patterns: tuple[str, ...]) -> None:
    """Stops gradients for the parameters whose names match a pattern."""
    names = {name for name, _ in model.named_parameters()}
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            example = sorted(names)[0]
            rule, hint = "matches no parameter", f"names look like {example}"
            raise ConfigError([Problem("train.freeze", pattern, rule, hint)])
        for name in matched:
            model.get_parameter(name).requires_grad_(False)
