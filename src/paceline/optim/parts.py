"""The parts of tensors that a rank holds: what optimizers move and checkpoints keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from paceline.plan.layout import Place


class Part(NamedTuple):
    """A rank's part of a named tensor.

    Attributes:
        tensor: the part, or a DTensor whose local tensor it is. Of a parameter: what the optimizer
            moves, whose ``grad`` is the part's gradient once gradients are finished.
        place: where it lies in the whole.
    """

    tensor: Tensor
    place: Place

    @classmethod
    def of_whole(cls, tensor: Tensor) -> Part:
        """A tensor that is not spread."""
        return cls(tensor, Place.of_whole(tuple(tensor.shape)))

    @property
    def local(self) -> Tensor:
        """The part itself."""
        return local(self.tensor)

    @property
    def gradient(self) -> Tensor | None:
        """The part's gradient, if it has one."""
        return None if self.tensor.grad is None else local(self.tensor.grad)

    def ensured_gradient(self) -> Tensor:
        """The part's gradient, which is made, of zeros, where no token has reached it."""
        if self.tensor.grad is None:
            self.tensor.grad = torch.zeros_like(self.tensor)
        return local(self.tensor.grad)

    @property
    def owned_gradient(self) -> Tensor | None:
        """The gradient of what this rank stands for."""
        gradient = self.gradient
        return None if gradient is None else gradient[self.place.owned.within(self.place.box)]


NamedParts = Mapping[str, Part] | Iterable[tuple[str, Part]]
"""Parts by the names of the tensors that they are of. As pairs, a name may come several times: a
rank's part of a tensor may be several boxes."""


def named_parts(parts: NamedParts) -> list[tuple[str, Part]]:
    """The same as pairs."""
    if isinstance(parts, Mapping):
        return list(cast(Mapping[str, Part], parts).items())
    return list(parts)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
