"""The experts that a rank holds: which they are, and the sums of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from paceline.dist.world import World
from paceline.models.decoder import Decoder
from paceline.models.moe import Experts, MixtureOfExperts
from paceline.optim.parts import Part
from paceline.parallel.buckets import sum_in_buckets
from paceline.parallel.cut import cut_parameter
from paceline.parallel.expert import DISPATCHES
from paceline.parallel.expert.all_to_all import AXIS
from paceline.plan.layout import Box, Place

GRADIENTS = "expert gradients"
REPLICAS = ("dp_replicate", "ep_replicate")
"""Axes whose ranks hold the same experts, and bring other tokens to them."""
SHARING = ("dp_shard", "cp", "tp")
"""Axes that `ep` re-groups: experts are spread over all of them."""


@dataclass(frozen=True, slots=True)
class SplitExperts:
    """What is known of a decoder once its experts are shared out.

    Attributes:
        places: where this rank's weights of experts lie in the whole ones.
        world: the ranks.
        reduce_dtype: in which gradients are summed over ranks.
    """

    places: Mapping[str, Place]
    world: World
    reduce_dtype: torch.dtype

    @property
    def names(self) -> frozenset[str]:
        """The parameters that are shared out so."""
        return frozenset(self.places)

    def among(self, places: Mapping[str, Place], spread_axes: tuple[str, ...]) -> dict[str, Place]:
        """The places of all parameters, of which each element has one owner on the sharing axes.

        Args:
            places: of the model without shared-out experts.
            spread_axes: over which others see to that.
        """
        copying = [axis for axis in SHARING if axis not in (*spread_axes, "tp")]
        is_copy = any(self.world.coordinate(axis) > 0 for axis in copying)
        of_others = {n: place.disowned() if is_copy else place for n, place in places.items()}
        return of_others | dict(self.places)

    def finish_gradients(self, parts: Mapping[str, Part]) -> None:
        """Sums the gradients of experts over the ranks that hold the same.

        Those of one rank are sums over its ranks of `ep` already, whose rows came here.

        Comm: an all-reduce of them over each of `REPLICAS`.
        """
        held = [parts[name] for name in self.places if parts[name].tensor.requires_grad]
        gradients = [part.ensured_gradient() for part in held]
        if any(self.world.degree(axis) > 1 for axis in REPLICAS):
            dtype = self.reduce_dtype
            sum_in_buckets(gradients, self.world, REPLICAS, purpose=GRADIENTS, dtype=dtype)


def split_experts(
    model: Decoder, world: World, *, dispatch: str, reduce_dtype: torch.dtype
) -> SplitExperts:
    """Leaves a decoder of the meta device this rank's experts, in place.

    Args:
        model: the whole one, or some blocks of it.
        world: the ranks.
        dispatch: the name of what brings rows to them.
        reduce_dtype: in which gradients are summed over ranks.
    """
    exchange = DISPATCHES.load(dispatch)(world)
    places: dict[str, Place] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MixtureOfExperts):
            module.dispatch = exchange
        elif isinstance(module, Experts):
            shapes = {f"{prefix}.{name}": tuple(p.shape) for name, p in module.named_parameters()}
            places |= {name: _place(shape, world) for name, shape in shapes.items()}
    for name, place in places.items():
        cut_parameter(model, name, place)
    return SplitExperts(places, world, reduce_dtype)


def _place(shape: tuple[int, ...], world: World) -> Place:
    share = shape[0] // world.degree(AXIS)
    first = world.coordinate(AXIS) * share
    box = Box.of_whole(shape).narrowed(0, range(first, first + share))
    place = replace(Place.of_whole(shape), box=box, owned=box)
    return place.disowned() if world.coordinate("ep_replicate") else place
