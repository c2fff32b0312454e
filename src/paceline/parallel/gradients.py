"""The norm of a module's whole gradient, however it is laid over ranks, and the clip by it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paceline.optim.parts import local
from paceline.parallel.spread import Spread, inner_module, spread_of
from paceline.parallel.tensor.boundary import AXIS
from paceline.plan.tensor_rules import Split


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float) -> float:
    """Scales a module's gradients in place so that their norm is at most `max_norm`.

    Every element of the whole model counts once: what tensor or data ranks share out is summed over
    them, what they all have is counted on one. All ranks call this, after the step's last backward
    pass. It is right for any module, in one process too.

    Args:
        module: what `paceline.parallelize` has given.
        max_norm: above 0.

    Returns:
        The norm before, the same on every rank.
    """
    spread = spread_of(module)
    norm = math.sqrt(_alone(module) if spread is None else _over_ranks(module, spread))
    if norm > max_norm:
        for parameter in module.parameters():
            if parameter.grad is not None:
                local(parameter.grad).mul_(max_norm / norm)
    return norm


def _alone(module: nn.Module) -> float:
    return sum(float(_squares(p.grad)) for p in module.parameters() if p.grad is not None)


def _over_ranks(module: nn.Module, spread: Spread) -> float:
    """The sum of squares of the whole gradient."""
    world, rank = spread.world, spread.world.coordinate(AXIS)
    # Two sums: of what every data rank has alike, and of what they share out.
    alike = torch.zeros((), dtype=torch.float64, device=world.device)
    shared_out = torch.zeros_like(alike)
    for name, parameter in inner_module(module).named_parameters():
        gradient, split = parameter.grad, spread.split_of(name)
        if gradient is None:
            continue
        if split.copied:
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            alike += _squares(_owned(whole, split, rank))
        elif split.dim is not None or rank == 0:
            total = shared_out if isinstance(gradient, DTensor) else alike
            total += _squares(local(gradient))
    world.sum(shared_out, ("dp_shard",), purpose="gradient norm")
    return float(world.sum(alike + shared_out, (AXIS,), purpose="gradient norm"))


def _squares(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient).double().square()


def _owned(gradient: Tensor, split: Split, rank: int) -> Tensor:
    """What no lower rank has too."""
    assert split.dim is not None, "what is copied is split"
    taken = {index for lower in range(rank) for index in split.indices(lower)}
    owned = [n for n, index in enumerate(split.indices(rank)) if index not in taken]
    indices = torch.tensor(owned, dtype=torch.int64, device=gradient.device)
    return gradient.index_select(split.dim, indices)
