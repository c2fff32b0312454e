"""A root-mean-square norm over values that are split over the `tp` axis."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paceline.dist.world import World
from paceline.models.linear import RMSNorm
from paceline.parallel.tensor.boundary import copy_in, sum_up


class SplitRMSNorm(nn.Module):
    """The norm of all ranks' values together.

    Args:
        whole: the norm of the plain model; its parameter is taken over, whole.
        columns: the values that this rank has.
        owned: of these, the ones that no lower rank has.
        world: the ranks.

    Comm: forward and backward, an all-reduce of one number a token.
    """

    def __init__(self, whole: RMSNorm, columns: range, owned: range, world: World) -> None:
        super().__init__()
        self.weight = whole.weight
        self._eps, self._offset = whole.eps, whole.offset
        self._columns = slice(columns.start, columns.stop)
        self._owned = slice(owned.start - columns.start, owned.stop - columns.start)
        self._world = world

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = wide[..., self._owned].square().sum(dim=-1, keepdim=True)
        # Every rank scales by the sum, so the sum's gradient is the sum of what ranks give.
        total = copy_in(sum_up(squares, self._world), self._world)
        normed = wide * torch.rsqrt(total / len(self.weight) + self._eps)
        weight = self.weight[self._columns]
        if self._offset:
            return (normed * (weight.to(wide.dtype) + self._offset)).to(x.dtype)
        return weight.to(x.dtype) * normed.to(x.dtype)
