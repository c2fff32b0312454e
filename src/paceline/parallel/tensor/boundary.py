"""Boundaries of what is split over the `tp` axis: a tensor goes from one layout to another.

Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, Sec. 3 (``copy_in`` and ``sum_up`` are its f
    and g); Korthikanti et al., arXiv:2205.05198, Sec. 4.2.2 (``gather_rows``, ``scatter_rows``).

Layouts of a tensor on the ranks of the axis:

- whole: every rank has all of it; its gradient, too, is the same on every rank.
- partial: every rank has a term of it; it is their sum.
- rows: the tokens of a batch, laid end to end and padded with zeros to a multiple of the number of
  ranks, are split evenly. Shape (1, R, D), R tokens a rank.
- columns: the last dimension is split.

A function's name is what it does forward; backward does the converse, so that each is written down
once. Where a tensor is whole, so is its gradient: where ranks use a whole tensor for different
things the gradient must be summed, which is what `copy_in` is for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from paceline.dist.world import World

AXIS = "tp"
PURPOSE = "tensor parallel"


def copy_in(x: Tensor, world: World) -> Tensor:
    """Whole to whole, each rank using it for its own part of what follows.

    Comm: backward, an all-reduce of the tensor's bytes.
    """
    return _CopyIn.apply(x, world)


def sum_up(x: Tensor, world: World) -> Tensor:
    """Partial to whole.

    Comm: forward, an all-reduce of the tensor's bytes.
    """
    return _SumUp.apply(x, world)


def gather_rows(x_1RD: Tensor, world: World) -> Tensor:
    """Rows to whole, padding and all: (1, R tp, D), each rank using it for its own part.

    Comm: forward, an all-gather, backward, a reduce-scatter of the whole tensor's bytes.
    """
    return _GatherRows.apply(x_1RD, world)


def scatter_rows(x_BTD: Tensor, world: World) -> Tensor:
    """Partial to rows: (1, ceil(B T / tp), D).

    Comm: forward, a reduce-scatter, backward, an all-gather of the padded tensor's bytes.
    """
    return _ScatterRows.apply(_padded(x_BTD, world), world)


def own_rows(x_BTD: Tensor, world: World) -> Tensor:
    """Whole to rows: (1, ceil(B T / tp), D). Its gradient is of this rank's rows alone: partial.

    Comm: none.
    """
    return _padded(x_BTD, world).chunk(world.degree(AXIS), dim=1)[world.coordinate(AXIS)]


def gather_columns(x: Tensor, sizes: tuple[int, ...], world: World) -> Tensor:
    """Columns to whole.

    Args:
        x: (..., this rank's columns).
        sizes: columns of each rank.
        world: the ranks.

    Comm: forward, an all-gather of the whole tensor's bytes, padded to the largest of `sizes`.
    """
    return _GatherColumns.apply(x, sizes, world)


def _padded(x_BTD: Tensor, world: World) -> Tensor:
    """The tokens laid end to end, (1, R tp, D), with zeros at the end."""
    rows_RD = x_BTD.flatten(0, 1)
    missing = -len(rows_RD) % world.degree(AXIS)
    return functional.pad(rows_RD, (0, 0, 0, missing))[None] if missing else rows_RD[None]


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return ctx.world.sum(_own(grad_outputs[0]), (AXIS,), purpose=PURPOSE), None


class _SumUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        del ctx
        return world.sum(_own(x), (AXIS,), purpose=PURPOSE)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        del ctx
        return grad_outputs[0], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1RD: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.gather(x_1RD[0], AXIS, purpose=PURPOSE)[None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return ctx.world.reduce_scatter(grad_outputs[0][0], AXIS, purpose=PURPOSE)[None], None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_1RD: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.reduce_scatter(x_1RD[0], AXIS, purpose=PURPOSE)[None]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        return ctx.world.gather(grad_outputs[0][0], AXIS, purpose=PURPOSE)[None], None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], world: World) -> Tensor:
        ctx.sizes, ctx.rank = sizes, world.coordinate(AXIS)
        width = max(sizes)
        padded = functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
        gathered = world.gather(padded[None], AXIS, purpose=PURPOSE)
        parts = zip(gathered, sizes, strict=True)
        return torch.cat([part[..., :size] for part, size in parts], dim=-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        return grad_outputs[0].split(ctx.sizes, dim=-1)[ctx.rank], None, None


def _own(x: Tensor) -> Tensor:
    """A copy that may be summed in place."""
    return x.clone(memory_format=torch.contiguous_format)
