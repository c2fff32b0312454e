"""Gradients of parts: this rank's rows of the sums over ranks, whatever the moment of summing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from paceline.dist.world import World
from paceline.parallel.buckets import buckets
from paceline.parallel.data.rows import pack_share, pack_whole, unpack_share


class ShardGradients:
    """Sums whole gradients over `dp_shard` into the gradients of parts, and these over replicas.

    Args:
        world: the ranks.
        dtype: in which sums over ranks are made.
        parts: each trained parameter and this rank's part of it, in an order that all ranks share.
    """

    def __init__(
        self, world: World, dtype: torch.dtype, parts: Mapping[nn.Parameter, nn.Parameter]
    ) -> None:
        self._world = world
        self._dtype = dtype
        self._parts = parts

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self._parts)

    @torch.no_grad()
    def reduce(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds the sums of some whole gradients to those of their parts, and frees the whole ones.

        Every rank of `dp_shard` brings the same parameters; a gradient that a rank lacks is zero.
        """
        degree = self._world.mesh.dp_shard
        shapes = [parameter.shape for parameter in parameters]
        gradients = [_take_gradient(parameter) for parameter in parameters]
        flat = pack_whole(gradients, degree, self._dtype)
        del gradients
        share = self._world.reduce_scatter(flat, "dp_shard", purpose="gradients")
        parts = [self._parts[parameter] for parameter in parameters]
        for part, rows in zip(parts, unpack_share(share, parts, shapes, degree), strict=True):
            if part.grad is None:
                part.grad = rows.to(part.dtype)
            else:
                part.grad += rows

    @torch.no_grad()
    def finish(self) -> None:
        """Called once a step: gives every part a gradient, and sums them over replicas."""
        for part in self._parts.values():
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        if self._world.mesh.dp_replicate == 1:
            return
        degree = self._world.mesh.dp_shard
        for bucket in buckets(self._parts):
            parts = [self._parts[parameter] for parameter in bucket]
            shapes = [parameter.shape for parameter in bucket]
            gradients = [part.grad for part in parts if part.grad is not None]
            flat = pack_share(gradients, shapes, degree, self._dtype)
            self._world.sum(flat, ("dp_replicate",), purpose="gradients")
            totals = unpack_share(flat, gradients, shapes, degree)
            for gradient, total in zip(gradients, totals, strict=True):
                gradient.copy_(total)


def _take_gradient(parameter: nn.Parameter) -> Tensor:
    """The whole gradient, which the parameter gives up; zeros if it has none."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        gradient = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        return gradient.expand(parameter.shape)
    return gradient
