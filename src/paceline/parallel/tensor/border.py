"""What is done at the borders of a module's split parts: by ranks, or by none, to prove a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from paceline.dist.world import World
from paceline.parallel.tensor.boundary import AXIS, PURPOSE, copy_in, gather_columns, sum_up
from paceline.plan.tensor_rules import Split


class Border(Protocol):
    """Where whole tensors become split ones, and back."""

    def enter(self, x: Tensor) -> Tensor:
        """A whole tensor that ranks use for their own parts; its gradients are summed."""
        ...

    def close(self, name: str, partial: Tensor) -> Tensor:
        """The sum of what ranks have for the module `name`."""
        ...

    def gather(self, name: str, columns: Tensor, split: Split) -> Tensor:
        """The columns of all ranks, in order."""
        ...

    def take(self, x: Tensor, split: Split) -> Tensor:
        """This rank's columns of a whole tensor."""
        ...

    def share(self, parameter: Tensor, split: Split) -> Tensor:
        """A parameter of which several ranks have the same rows; their gradients are summed."""
        ...


class Ranks:
    """The border between the ranks of a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rank = world.coordinate(AXIS)

    def enter(self, x: Tensor) -> Tensor:
        return copy_in(x, self._world)

    def close(self, name: str, partial: Tensor) -> Tensor:
        del name
        return sum_up(partial, self._world)

    def gather(self, name: str, columns: Tensor, split: Split) -> Tensor:
        del name
        sizes = tuple(sum(map(len, share)) for share in split.shares)
        return gather_columns(columns, sizes, self._world)

    def take(self, x: Tensor, split: Split) -> Tensor:
        indices = torch.tensor(split.indices(self._rank), device=x.device)
        return _Take.apply(x, indices, self._world)

    def share(self, parameter: Tensor, split: Split) -> Tensor:
        assert split.dim is not None, "a whole parameter is entered"
        copied = sorted(split.copied)
        place = {index: n for n, index in enumerate(copied)}
        own = split.indices(self._rank)
        mine = [n for n, index in enumerate(own) if index in place]
        there = [place[own[n]] for n in mine]
        device = parameter.device
        positions = (torch.tensor(mine, device=device), torch.tensor(there, device=device))
        return _Share.apply(parameter, split.dim, positions, len(copied), self._world)


class Probe:
    """One rank's part of a module without the others: what it would send is kept.

    Args:
        expected: module to what its border gives in the whole module, which goes on from here.
        rank: of the tensor ranks.

    Attributes:
        partial: module to what this rank would add to the sum, or to the columns.
    """

    def __init__(self, expected: Mapping[str, Tensor], rank: int) -> None:
        self._expected = expected
        self._rank = rank
        self.partial: dict[str, Tensor] = {}

    def enter(self, x: Tensor) -> Tensor:
        return x

    def close(self, name: str, partial: Tensor) -> Tensor:
        self.partial[name] = partial
        return self._expected[name]

    def gather(self, name: str, columns: Tensor, split: Split) -> Tensor:
        whole = torch.zeros_like(self._expected[name])
        whole[..., split.indices(self._rank)] = columns
        self.partial[name] = whole
        return self._expected[name]

    def take(self, x: Tensor, split: Split) -> Tensor:
        return x[..., split.indices(self._rank)]

    def share(self, parameter: Tensor, split: Split) -> Tensor:
        del split
        return parameter


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor, world: World) -> Tensor:
        ctx.shape, ctx.indices, ctx.world = x.shape, indices, world
        return x.index_select(-1, indices)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        whole = grad_outputs[0].new_zeros(ctx.shape).index_copy_(-1, ctx.indices, grad_outputs[0])
        return ctx.world.sum(whole, (AXIS,), purpose=PURPOSE), None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parameter: Tensor,
        dim: int,
        positions: tuple[Tensor, Tensor],
        num_copied: int,
        world: World,
    ) -> Tensor:
        ctx.dim, ctx.positions, ctx.num_copied, ctx.world = dim, positions, num_copied, world
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None, None]:
        grad, (mine, there) = grad_outputs[0], ctx.positions
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.num_copied
        total = grad.new_zeros(shape)
        total.index_copy_(ctx.dim, there, grad.index_select(ctx.dim, mine))
        ctx.world.sum(total, (AXIS,), purpose=PURPOSE)
        summed = grad.index_copy(ctx.dim, mine, total.index_select(ctx.dim, there))
        return summed, None, None, None, None
