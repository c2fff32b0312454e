"""Gradients that are summed over ranks as they become ready, unit by unit, in buckets."""

from __future__ import annotations

from torch import Tensor, nn

from paceline.parallel import buckets
from paceline.parallel.data.shard_gradients import ShardGradients
from paceline.parallel.data.units import FIRST, Unit


class ReadyGradients:
    """Follows backward passes and reduces each unit's gradients when its pass is over.

    What is reduced together follows from the order of units alone, and not from which gradients a
    rank has, so all ranks bring the same; a gradient that a rank lacks is zero. Gradients that
    autograd does not bring (`on_ready`) are reduced when the pass that brings them is over.

    Args:
        gradients: sums them.
        units: of the model.
    """

    def __init__(self, gradients: ShardGradients, units: list[Unit]) -> None:
        self._gradients = gradients
        trained = set(gradients.parameters)
        self._trained = {
            unit: [parameter for parameter in unit.parameters if parameter in trained]
            for unit in units
        }
        self._shared = frozenset(p for unit in units for p in unit.shared)
        self._deferred: set[nn.Parameter] = set()
        self._late: dict[nn.Parameter, None] = {}
        self._open: list[Unit] = []
        self._bucket: dict[nn.Parameter, None] = {}
        self._size_bytes = 0

    def is_open(self, unit: Unit) -> bool:
        """Whether the backward pass is in a unit."""
        return unit in self._open

    def begin(self, unit: Unit) -> list[Unit]:
        """The backward pass has come to a unit.

        Returns:
            The units that it has left by that: all others but the first.
        """
        left = [other for other in self._open if other.name != FIRST and other is not unit]
        self._leave(left)
        if unit not in self._open:
            self._open.append(unit)
        return left

    def defer(self, parameter: Tensor) -> None:
        """A gradient that autograd has not brought is in ``parameter.grad``."""
        assert isinstance(parameter, nn.Parameter)
        self._deferred.add(parameter)
        self._add(parameter)

    def finish_pass(self) -> None:
        """Reduces all that is left of a pass."""
        self._leave(list(self._open))
        late, self._late = list(self._late), {}
        for parameter in late:
            self._add(parameter)
        self._flush()

    def _leave(self, units: list[Unit]) -> None:
        for unit in units:
            self._open.remove(unit)
            for parameter in self._trained[unit]:
                if parameter in self._shared:  # the other unit may add to it yet
                    self._late[parameter] = None
                # One that is deferred comes later, unless this pass was not split.
                elif parameter not in self._deferred or parameter.grad is not None:
                    self._add(parameter)

    def _add(self, parameter: nn.Parameter) -> None:
        if parameter not in self._bucket:
            self._bucket[parameter] = None
            self._size_bytes += parameter.numel() * parameter.dtype.itemsize
            if self._size_bytes >= buckets.BUCKET_BYTES:
                self._flush()

    def _flush(self) -> None:
        bucket, self._bucket, self._size_bytes = list(self._bucket), {}, 0
        if bucket:
            self._gradients.reduce(bucket)
