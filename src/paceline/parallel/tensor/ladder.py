"""A ladder's sums over tensor ranks, each under way while the neighbouring sublayer is computed.

Source: Zhang et al., Ladder-residual, arXiv:2501.06589, Sec. 3 (forward); Shoeybi et al.,
    Megatron-LM, arXiv:1909.08053, Sec. 3 (the two sums of a sublayer).
Cost: a sublayer costs an all-reduce of the hidden states' bytes forward and one backward, as a
    plain one does; the backward one is of the gradient before the norm, not behind it, so a step
    sums the gradients of a ladder's norms and biases too. Where blocks are computed again, the sum
    in a block's middle is begun once more, and nobody waits for it.
Differs: the backward pass overlaps as well.

Forward, the sum of a sublayer's output is waited for once the next sublayer has been computed.
Backward, a sublayer gives a term of its input's gradient, whose sum the sublayer *before* it does
not need: that one's own output is added later. The sum is needed by the sublayer before that. For
autograd to see it so, each stream between sublayers is one node (`_Add`) and so is every way from a
stream into a sublayer (`_Enter`): backward, the second starts a sum and gives autograd nothing; the
first waits for the sums that were started for its stream and adds them. Its node comes before the
nodes of the sublayer that runs meanwhile, since autograd, of all that is ready, takes first what
was made last. So in the forward pass it is made before that sublayer runs, and filled after it.
That order makes the overlap; what is computed follows from the graph alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from paceline.dist.collectives import Pending
from paceline.dist.world import World
from paceline.models.ladder import Stream, Sublayer
from paceline.models.linear import Linear, Product
from paceline.parallel.tensor.boundary import AXIS, PURPOSE


class _Started:
    """Sums of gradients that have been started and belong to one stream."""

    def __init__(self) -> None:
        self._sums: list[tuple[Tensor, Pending]] = []

    def add(self, total: Tensor, pending: Pending) -> None:
        self._sums.append((total, pending))

    def added_to(self, gradient: Tensor) -> Tensor:
        """The gradient and all sums, which are waited for."""
        for total, pending in self._sums:
            pending.wait()
            gradient = gradient + total
        self._sums.clear()
        return gradient


class _UnderWay(NamedTuple):
    """What is known of a stream.

    Attributes:
        gradients: sums that belong to its `x_BTD`.
        output: the sum that is its `output_BTD`.
    """

    gradients: _Started
    output: Pending


class OverlappedSums:
    """Sums each sublayer's output over tensor ranks while the next sublayer runs.

    Args:
        world: the ranks.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def open(self, x_BTD: Tensor) -> Stream:
        started = _Started()
        return Stream(_Add.apply(started, x_BTD, None), None, _UnderWay(started, Pending(None)))

    def step(self, stream: Stream, sublayer: Sublayer) -> Stream:
        x_BTD, started = self._promised(stream)  # before the sublayer's nodes: see above
        entered_BTD = _Enter.apply(stream.x_BTD, _under_way(stream).gradients, self._world)
        output_BTD = sublayer(entered_BTD).clone(memory_format=torch.contiguous_format)
        pending = self._world.sum_start(output_BTD.detach(), (AXIS,), purpose=PURPOSE)
        _fill(x_BTD, stream)
        return Stream(x_BTD, output_BTD, _UnderWay(started, pending))

    def close(self, stream: Stream) -> Tensor:
        x_BTD, _ = self._promised(stream)
        _fill(x_BTD, stream)
        return x_BTD

    def _promised(self, stream: Stream) -> tuple[Tensor, _Started]:
        """The stream with its output added, whose values `_fill` gives it, and its gradients."""
        if stream.output_BTD is None:  # the first two sublayers take the same
            return stream.x_BTD, _under_way(stream).gradients
        started = _Started()
        return _Add.apply(started, stream.x_BTD, stream.output_BTD), started


@torch.no_grad()
def _fill(x_BTD: Tensor, stream: Stream) -> None:
    """Waits for a stream's output, and gives their sum to the memory made for it."""
    if stream.output_BTD is None:
        return
    _under_way(stream).output.wait()
    # Aliases: for autograd the values have been there since the memory was made.
    torch.add(stream.x_BTD.detach(), stream.output_BTD.detach(), out=x_BTD.detach())


def _under_way(stream: Stream) -> _UnderWay:
    assert isinstance(stream.under_way, _UnderWay), "the stream of another overlap"
    return stream.under_way


class _Add(torch.autograd.Function):
    """A stream, or a stream and an output, whose sum somebody fills in."""

    @staticmethod
    def forward(ctx: Any, gradients: _Started, x_BTD: Tensor, output_BTD: Tensor | None) -> Tensor:
        ctx.gradients, ctx.is_sum = gradients, output_BTD is not None
        return torch.empty_like(x_BTD) if ctx.is_sum else x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, Tensor | None]:
        gradient_BTD = ctx.gradients.added_to(grad_outputs[0])
        return None, gradient_BTD, gradient_BTD if ctx.is_sum else None


class _Enter(torch.autograd.Function):
    """The identity, from a whole stream to what each rank uses for its own part."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, gradients: _Started, world: World) -> Tensor:
        ctx.gradients, ctx.world = gradients, world
        return x_BTD.view_as(x_BTD)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, None, None]:
        total_BTD = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        pending = ctx.world.sum_start(total_BTD, (AXIS,), purpose=PURPOSE)
        ctx.gradients.add(total_BTD, pending)
        return None, None, None


def leave_term(linear: Linear, world: World) -> None:
    """Has a matrix that is split by its inputs give a rank's term; the first has its bias in it."""
    multiply: Product = linear.product
    is_first = _is_first(world)

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = multiply(x, weight, None)
        # The others' gradient of it is zero, and not absent, so that all ranks sum the same.
        return y if bias is None else y + is_first * bias.to(y.dtype)

    linear.product = product


def _is_first(world: World) -> bool:
    return world.coordinate(AXIS) == 0
