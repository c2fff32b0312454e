"""How tensors go round the parts of a row: a ring of ranks along the `cp` axis."""

from __future__ import annotations

from torch import Tensor

from paceline.dist.p2p import PendingTensor, PointToPoint
from paceline.dist.world import World
from paceline.parallel.context.placement import AXIS, Placement


class Ring:
    """The ranks that have the same share of each part, one for each part.

    Every rank of the world makes one at the same time.

    Args:
        world: the ranks.
        placement: which parts there are, and who has them.
        purposes: what is sent.
        is_full: whether every rank sends to every other one, and not to its next one alone.

    Attributes:
        index: this rank's part.
        size: how many there are.
    """

    def __init__(
        self,
        world: World,
        placement: Placement,
        purposes: tuple[str, ...],
        *,
        is_full: bool = False,
    ) -> None:
        self._stride = placement.ranks_per_part
        self.index, self._share = divmod(world.coordinate(AXIS), self._stride)
        self.size = placement.num_parts
        steps = range(1, self.size) if is_full else range(1, min(2, self.size))
        distances = tuple(step * self._stride for step in steps)
        self._peers = PointToPoint(world, AXIS, purposes, distances=distances)

    def send(self, tensor: Tensor, steps: int, purpose: str) -> None:
        """Begins to send a tensor to the rank so many parts further."""
        self._peers.send(tensor, self._rank(steps), purpose)

    def receive(self, like: Tensor, steps: int, purpose: str) -> PendingTensor:
        """Makes room for a tensor, of another one's shape and dtype, that the rank so many parts
        further sends.
        """
        return self._peers.receive(tuple(like.shape), like.dtype, self._rank(steps), purpose)

    def finish(self) -> None:
        """Returns once all that was sent has been taken."""
        self._peers.finish()

    def part(self, steps: int) -> int:
        """The part so many further than this rank's."""
        return (self.index + steps) % self.size

    def _rank(self, steps: int) -> int:
        return self.part(steps) * self._stride + self._share
