"""What ranks send each other, written down: operation, axes, bytes, purpose, and when."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from paceline.dist.compat import all_gather, reduce_scatter
from paceline.dist.ring import Ring

KEPT = 1 << 16
"""How many transfers are kept: more than a test counts, and bounded, because runs are long."""


class Transfer(NamedTuple):
    """One collective, as this rank called it."""

    operation: str
    axes: tuple[str, ...]
    size_bytes: int
    purpose: str


class Traffic:
    """The collectives of one rank: the last ones in order, and the times of all in a ring.

    Args:
        ring: gets the times; absent: nobody watches.

    Attributes:
        transfers: the last `KEPT`.
        count: of all that there were.
    """

    def __init__(self, ring: Ring | None = None) -> None:
        self.ring = ring
        self.transfers: deque[Transfer] = deque(maxlen=KEPT)
        self.count = 0
        self._bytes: Counter[str] = Counter()

    def add(self, operation: str, axes: tuple[str, ...], size_bytes: int, purpose: str) -> None:
        """Counts a collective whose times nobody knows."""
        self.transfers.append(Transfer(operation, axes, size_bytes, purpose))
        self.count += 1
        self._bytes[purpose] += size_bytes

    def enter(
        self,
        operation: str,
        axes: tuple[str, ...],
        size_bytes: int,
        purpose: str,
        *,
        waits: bool = True,
    ) -> int:
        """Counts a collective that begins; gives what `Ring.enter` gives, 0 where there is none."""
        self.add(operation, axes, size_bytes, purpose)
        if self.ring is None:
            return 0
        return self.ring.enter(operation, axes, size_bytes, purpose, waits=waits)

    def enter_uncounted(self, operation: str, purpose: str) -> int:
        """A call of all ranks begins that is no traffic of a cost model."""
        return 0 if self.ring is None else self.ring.enter(operation, (), 0, purpose)

    def enter_way(
        self,
        operation: str,
        axis: str,
        ends: tuple[int, int],
        size_bytes: int,
        purpose: str,
        *,
        is_counted: bool = True,
    ) -> int:
        """A send or a receive begins; gives what `Ring.enter_way` gives, or 0.

        It is counted, unless it is a part of a collective that has been.
        """
        if is_counted:
            self.add(operation, (axis,), size_bytes, purpose)
        if self.ring is None:
            return 0
        return self.ring.enter_way(operation, axis, ends, size_bytes, purpose)

    def waits(self, number: int) -> None:
        """The rank begins to wait for the end of a call."""
        if self.ring is not None:
            self.ring.waits(number)

    def leaves(self, number: int) -> None:
        """The rank goes on after a call."""
        if self.ring is not None:
            self.ring.leaves(number)

    def total_bytes(self, purpose: str) -> int:
        """Bytes given to the collectives of one purpose."""
        return self._bytes[purpose]


class Pending:
    """A collective that has been started.

    One that nobody waits for holds its tensor until it is done.

    Args:
        work: torch's handle; None where there is nothing to wait for.
        traffic: where its times are written down.
        number: of the call there.
    """

    def __init__(
        self, work: torch.distributed.Work | None, traffic: Traffic | None = None, number: int = 0
    ) -> None:
        self.work = work
        self.number = number
        self._traffic = traffic

    def wait(self) -> None:
        """Returns once the result is there, at once where it has been waited for before."""
        if self.work is None:
            return
        if self._traffic is not None:
            self._traffic.waits(self.number)
        self.work.wait()
        if self._traffic is not None:
            self._traffic.leaves(self.number)
        self.work = None


class _Counted:
    """A collective that torch's ``fully_shard`` calls in place of its own, to the same effect.

    Args:
        traffic: where it is written down.
        axes: of the mesh, that its group is along.
        purpose: of all its calls.
    """

    def __init__(self, traffic: Traffic, axes: tuple[str, ...], purpose: str) -> None:
        self._traffic = traffic
        self._axes = axes
        self._purpose = purpose

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what it takes or gives."""
        return torch.empty(size, dtype=dtype, device=device)

    def _enter(self, operation: str, whole: Tensor) -> int:
        return self._traffic.enter(operation, self._axes, whole.nbytes, self._purpose)

    def _left(self, number: int, work: torch.distributed.Work | None) -> Any:
        """The handle, if there is one: then the end is not when the call returns."""
        if work is None:
            self._traffic.leaves(number)
        elif self._traffic.ring is not None:
            work.get_future().add_done_callback(lambda _: self._traffic.leaves(number))
        return work


class CountedAllGather(_Counted):
    """For ``FSDPModule.set_custom_all_gather``."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        number = self._enter("all-gather", output_tensor)
        work = all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return self._left(number, work)


class CountedReduceScatter(_Counted):
    """For ``FSDPModule.set_custom_reduce_scatter``."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        number = self._enter("reduce-scatter", input_tensor)
        work = reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        return self._left(number, work)
