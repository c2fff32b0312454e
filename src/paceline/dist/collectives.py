"""What ranks send each other, written down: operation, axes, bytes, purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from paceline.dist.compat import all_gather, reduce_scatter


class Transfer(NamedTuple):
    """One collective, as this rank called it."""

    operation: str
    axes: tuple[str, ...]
    size_bytes: int
    purpose: str


class Pending:
    """A collective that has been started.

    One that nobody waits for holds its tensor until it is done.

    Args:
        work: torch's handle; None where there is nothing to wait for.
    """

    def __init__(self, work: torch.distributed.Work | None) -> None:
        self.work = work

    def wait(self) -> None:
        """Returns once the result is there, at once where it has been waited for before."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class Traffic:
    """The collectives of one rank, in order."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def add(self, operation: str, axes: tuple[str, ...], size_bytes: int, purpose: str) -> None:
        self.transfers.append(Transfer(operation, axes, size_bytes, purpose))

    def total_bytes(self, purpose: str) -> int:
        """Bytes given to the collectives of one purpose."""
        return sum(t.size_bytes for t in self.transfers if t.purpose == purpose)


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


class CountedAllGather(_Counted):
    """For ``FSDPModule.set_custom_all_gather``."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        self._traffic.add("all-gather", self._axes, output_tensor.nbytes, self._purpose)
        return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class CountedReduceScatter(_Counted):
    """For ``FSDPModule.set_custom_reduce_scatter``."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        self._traffic.add("reduce-scatter", self._axes, input_tensor.nbytes, self._purpose)
        return reduce_scatter(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
