"""Tensors from one rank to another, while both go on computing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from paceline.dist.collectives import Traffic
from paceline.dist.ring import members_of
from paceline.dist.world import Sending, World, make_group


class _Transfer(NamedTuple):
    """A transfer under way, its tensor, which must live until it is done, and its call's number."""

    work: Sending
    tensor: Tensor
    number: int


class PendingTensor:
    """A tensor that is on its way.

    Args:
        work: torch's handle.
        tensor: what is written into.
        traffic: where its times are written down.
        number: of the call there.
    """

    def __init__(
        self, work: torch.distributed.Work, tensor: Tensor, traffic: Traffic, number: int
    ) -> None:
        self._work = work
        self._tensor = tensor
        self._traffic = traffic
        self._number = number

    def wait(self) -> Tensor:
        """The tensor, once it is here; on a GPU once it is for what is queued from now on."""
        self._traffic.waits(self._number)
        self._work.wait()
        self._traffic.leaves(self._number)
        return self._tensor


class PointToPoint:
    """Sends and receives between the ranks that differ only on one axis of the mesh.

    What one rank sends another for one purpose arrives in the order it was sent in, and transfers
    of other purposes or the other way never wait for it: each purpose has a group of its own for
    transfers up the axis and one for those down. (NCCL runs what a group is told in order; with
    one group a send could stand behind a receive that waits for it.)

    Every rank of the world must make one at the same time.

    Args:
        world: the ranks; its traffic gets every transfer.
        axis: of the mesh.
        purposes: what is sent, for example ``("activations", "gradients")``.
        distances: between ranks that send each other something, round the axis.
    """

    def __init__(
        self,
        world: World,
        axis: str,
        purposes: tuple[str, ...],
        *,
        distances: Sequence[int] = (1,),
    ) -> None:
        self.world = world
        self.axis = axis
        self.index = world.coordinate(axis)
        self._ranks = members_of(world.mesh, world.rank, (axis,))
        self._under_way: deque[_Transfer] = deque()
        self._groups: dict[tuple[str, bool], torch.distributed.ProcessGroup] = {}
        if world.degree(axis) > 1 and distances:
            self._groups = {
                (purpose, is_up): make_group(world.mesh, world.rank, (axis,))
                for purpose in purposes
                for is_up in (True, False)
            }
            self._connect(distances)

    def send(self, tensor: Tensor, destination: int, purpose: str) -> None:
        """Begins to send a tensor, which nobody may change before `finish` has returned.

        Args:
            tensor: any that is dense.
            destination: the other rank's index on the axis.
            purpose: one of `purposes`.
        """
        self._forget_what_has_arrived()
        dense = tensor.detach().contiguous()
        group = self._group(purpose, source=self.index, destination=destination)
        ends = self._ranks[self.index], self._ranks[destination]
        call = self.world.traffic.enter_way("send", self.axis, ends, dense.nbytes, purpose)
        work = self.world.send_start(dense, group, destination)
        self._under_way.append(_Transfer(work, dense, call))

    def receive(
        self, shape: tuple[int, ...], dtype: torch.dtype, source: int, purpose: str
    ) -> PendingTensor:
        """Makes room for a tensor that another rank sends.

        Args:
            shape: of what it sends.
            dtype: of what it sends.
            source: the other rank's index on the axis.
            purpose: one of `purposes`.
        """
        tensor = torch.empty(shape, dtype=dtype, device=self.world.device)
        group = self._group(purpose, source=source, destination=self.index)
        traffic, ends = self.world.traffic, (self._ranks[source], self._ranks[self.index])
        call = traffic.enter_way("receive", self.axis, ends, tensor.nbytes, purpose)
        work = torch.distributed.irecv(tensor, group=group, group_src=source)
        assert work is not None
        return PendingTensor(work, tensor, traffic, call)

    def finish(self) -> None:
        """Returns once all that was sent has been taken: gloo tells of no send before."""
        while self._under_way:
            self._end(self._under_way.popleft())

    def _end(self, transfer: _Transfer) -> None:
        self.world.traffic.waits(transfer.number)
        transfer.work.wait()
        self.world.traffic.leaves(transfer.number)

    def _group(
        self, purpose: str, *, source: int, destination: int
    ) -> torch.distributed.ProcessGroup:
        assert source != destination, "a rank sends itself nothing"
        return self._groups[purpose, source < destination]

    def _forget_what_has_arrived(self) -> None:
        while self._under_way and self._under_way[0].work.is_completed():
            self._end(self._under_way.popleft())

    def _connect(self, distances: Sequence[int]) -> None:
        """Has ranks so far from each other, round the axis, meet in every group.

        NCCL connects two ranks at their first transfer, and both wait for it there. If they first
        met in the order of a schedule, some could wait for others that wait for them; here all
        go through all pairs in one order. It is no traffic of a run: nothing is recorded.
        """
        degree = self.world.degree(self.axis)
        token = torch.zeros(1, device=self.world.device)
        pairs = sorted(
            {tuple(sorted((low, (low + d) % degree))) for low in range(degree) for d in distances}
        )
        for (_, is_up), group in self._groups.items():
            for pair in pairs:
                source, destination = pair if is_up else reversed(pair)
                if self.index == source:
                    torch.distributed.send(token, group=group, group_dst=destination)
                elif self.index == destination:
                    torch.distributed.recv(token, group=group, group_src=source)
