"""Optimizer state split over ranks (ZeRO stage 1): each rank moves its rows of every parameter.

Source: Rajbhandari et al., ZeRO, arXiv:1910.02054, Sec. 5.1 and 7.2.1.
Replaces: replicated.  Needs: mesh.dp_shard > 1.  Forbids: nothing.
Cost: memory a rank: P whole parameters, P whole gradients while they accumulate and P / dp_shard
    after that, optimizer state / dp_shard. A step reduce-scatters P_g x reduce bytes of gradients
    and all-gathers P_g x params bytes of parameters; with dp_replicate > 1 it all-reduces
    P_g / dp_shard x reduce bytes of gradients too. P_g: trained parameters, each tensor's rows
    padded to a multiple of dp_shard.
Differs: parameters are split by rows, tensor by tensor, and not as one flat vector, so that parts
    keep their names and shapes; buckets follow the last backward pass, without overlap.
"""

# ruff: noqa: ARG002 (arguments are the contract's)
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from paceline.dist.world import World
from paceline.models.decoder import Decoder
from paceline.models.weights import copy_whole
from paceline.optim.parts import Part
from paceline.parallel.buckets import buckets
from paceline.parallel.data.base import DataParallel
from paceline.parallel.data.rows import pack_share, unpack_whole
from paceline.parallel.data.shard_gradients import ShardGradients
from paceline.plan.layout import Place, padded_share


class OptimizerSharded(DataParallel):
    """ZeRO stage 1, over `dp_shard`; whole replicas of it over `dp_replicate`."""

    spread_axes = ("dp_shard",)

    def wrap(self, model: Decoder) -> None:
        pass

    def put(self, name: str, parameter: nn.Parameter, value: Tensor) -> None:
        copy_whole(name, parameter, value)

    def hold(self, model: Decoder, places: Mapping[str, Place]) -> dict[str, Part]:
        parts = hold_rows(model, places, self.world, self.apart)
        self._parts = trained_parts(model, parts, self.apart)
        self._gradients = ShardGradients(self.world, self.reduce_dtype, self._parts)
        return parts

    def finish_pass(self, model: Decoder) -> None:
        pass  # whole gradients accumulate

    def finish_gradients(self, model: Decoder) -> None:
        for bucket in buckets(self._parts):
            self._gradients.reduce(bucket)
        self._gradients.finish()

    def finish_update(self, model: Decoder) -> None:
        gather_rows(self._parts, self.world)

    def finish_evaluation(self, model: Decoder) -> None:
        pass  # every rank has whole parameters


def hold_rows(
    model: Decoder, places: Mapping[str, Place], world: World, apart: frozenset[str]
) -> dict[str, Part]:
    """Parts of whole parameters: of trained ones this rank's rows, as views of their memory.

    Frozen parameters are held whole, since no rank would have to tell others of them, but each
    rank stands for its rows alone. Parameters that are `apart` are held as they are.
    """
    degree, index = world.mesh.dp_shard, world.coordinate("dp_shard")
    parts: dict[str, Part] = {}
    for name, parameter in model.named_parameters():
        place = places[name]
        if name in apart:
            parts[name] = Part(parameter, place)
            continue
        span = padded_share(place.box.sizes[0], degree, index)
        rows = place.rows(span)
        if parameter.requires_grad:
            view = parameter.detach()[span.start : span.stop]
            parts[name] = Part(nn.Parameter(view), rows)
        else:
            parts[name] = Part(parameter, replace(place, owned=rows.owned))
    return parts


def trained_parts(
    model: Decoder, parts: Mapping[str, Part], apart: frozenset[str]
) -> dict[nn.Parameter, nn.Parameter]:
    """Each trained parameter that is not `apart`, and the part of it that the optimizer moves."""
    found: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        part = parts[name].tensor
        if parameter.requires_grad and name not in apart:
            assert isinstance(part, nn.Parameter)
            found[parameter] = part
    return found


@torch.no_grad()
def gather_rows(parts: Mapping[nn.Parameter, nn.Parameter], world: World) -> None:
    """Fills whole parameters with the rows that the ranks of `dp_shard` have of them."""
    degree = world.mesh.dp_shard
    for bucket in buckets(parts):
        mine = [parts[parameter] for parameter in bucket]
        shapes = [parameter.shape for parameter in bucket]
        share = pack_share(mine, shapes, degree, mine[0].dtype)
        flat = world.gather(share, "dp_shard", purpose="parameters")
        # Not a change that autograd is to know of: to a graph that is alive, values are as before.
        unpack_whole(flat, [parameter.data for parameter in bucket])
