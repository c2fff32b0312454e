"""Faults for tests and proofs: a world in which a rank dies, stops, sleeps, or sends slowly.

Nothing that trains knows of them: a `FaultyWorld` stands in for a `World`.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed
from torch import Tensor

from paceline.dist.collectives import Traffic
from paceline.dist.ring import Ring
from paceline.dist.world import Sending, World
from paceline.plan.mesh import MeshConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        kind: ``crash`` and ``stop``: the process gets SIGKILL, SIGSTOP; ``sleep``: it sleeps;
            ``slow``: what it sends another rank takes longer, while it goes on itself.
        rank: whose fault it is.
        step: in which step, by the world's count of finished ones, that follows so many.
        num_steps: in how many in a row.
        place: before which call of the step, as a share of the calls that a step has.
        is_inside: whether it is after the call has been announced, and not before.
        time_s: of a sleep, or that each transfer takes longer.
        destination: of what is slow.
    """

    kind: Literal["crash", "stop", "sleep", "slow"]
    rank: int
    step: int
    num_steps: int = 1
    place: float = 0.0
    is_inside: bool = False
    time_s: float = 0.0
    destination: int = -1

    def is_on(self, step: int) -> bool:
        """Whether it goes wrong in the step after so many."""
        return self.step <= step < self.step + self.num_steps


class FaultyWorld(World):
    """A world in which something goes wrong.

    Args:
        mesh: as of a world.
        rank: as of a world.
        device: as of a world.
        ring: as of a world.

    Attributes:
        faults: may be changed between steps.
        step: how many have finished.
    """

    def __init__(
        self, mesh: MeshConfig, rank: int, device: torch.device, ring: Ring | None = None
    ) -> None:
        super().__init__(mesh, rank, device, ring)
        self.faults: tuple[Fault, ...] = ()
        self.step = 0
        self.traffic = self._stumbling = _StumblingTraffic(self, ring)
        self._lines: dict[int, _SlowLine] = {}

    def finish_step(self, step: int) -> None:
        super().finish_step(step)
        self.step += 1
        self._stumbling.finish_step()

    def send_start(
        self, tensor: Tensor, group: torch.distributed.ProcessGroup, destination: int
    ) -> Sending:
        rank = torch.distributed.get_global_rank(group, destination)
        slow = [
            fault.time_s
            for fault in self.faults
            if fault.kind == "slow"
            and (fault.rank, fault.destination) == (self.rank, rank)
            and fault.is_on(self.step)
        ]
        line = self._lines.setdefault(rank, _SlowLine())
        if not slow and not line.is_busy:
            return super().send_start(tensor, group, destination)
        # Later transfers follow the slow ones, whatever their time: order is kept.
        return line.send(_LateSending(tensor, group, destination, sum(slow)))


class _StumblingTraffic(Traffic):
    """Where all calls begin, and so where a rank may stumble."""

    def __init__(self, world: FaultyWorld, ring: Ring | None) -> None:
        super().__init__(ring)
        self._world = world
        self._calls, self._usual_calls = 0, 1

    def enter(
        self,
        operation: str,
        axes: tuple[str, ...],
        size_bytes: int,
        purpose: str,
        *,
        waits: bool = True,
    ) -> int:
        self._stumble(is_inside=False)
        number = super().enter(operation, axes, size_bytes, purpose, waits=waits)
        self._stumble(is_inside=True)
        self._calls += 1
        return number

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
        self._stumble(is_inside=False)
        number = super().enter_way(
            operation, axis, ends, size_bytes, purpose, is_counted=is_counted
        )
        self._stumble(is_inside=True)
        self._calls += 1
        return number

    def finish_step(self) -> None:
        """The next call is the first of a step."""
        self._calls, self._usual_calls = 0, max(1, self._calls)

    def _stumble(self, *, is_inside: bool) -> None:
        world = self._world
        for fault in world.faults:
            is_here = fault.rank == world.rank and fault.is_on(world.step)
            at = int(fault.place * self._usual_calls)
            if is_here and at == self._calls and fault.is_inside == is_inside:
                _do(fault)


def _do(fault: Fault) -> None:
    if fault.kind == "sleep":
        time.sleep(fault.time_s)
    elif fault.kind == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)


class _LateSending:
    """A transfer that begins some time after it has been handed over."""

    def __init__(
        self,
        tensor: Tensor,
        group: torch.distributed.ProcessGroup,
        destination: int,
        late_s: float,
    ) -> None:
        self._tensor, self._group, self._destination = tensor, group, destination
        self.due_s = time.perf_counter() + late_s
        self._begun = threading.Event()
        self._work: torch.distributed.Work | None = None

    @property
    def is_begun(self) -> bool:
        return self._begun.is_set()

    def begin(self) -> None:
        """Sends it, once its time has come."""
        time.sleep(max(0.0, self.due_s - time.perf_counter()))
        self._work = torch.distributed.isend(
            self._tensor, group=self._group, group_dst=self._destination
        )
        self._begun.set()

    def is_completed(self) -> bool:
        return self._work is not None and self._work.is_completed()

    def wait(self) -> None:
        self._begun.wait()
        assert self._work is not None
        self._work.wait()


class _SlowLine:
    """Begins transfers to one rank one after the other, in a thread: nobody else is held up."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[_LateSending] = queue.SimpleQueue()
        self._last: _LateSending | None = None

    @property
    def is_busy(self) -> bool:
        """Whether transfers have not begun that later ones must stay behind."""
        return self._last is not None and not self._last.is_begun

    def send(self, sending: _LateSending) -> _LateSending:
        """Has a transfer begin in its turn."""
        if self._last is None:
            threading.Thread(target=self._run, name="slow-line", daemon=True).start()
        self._last = sending
        self._waiting.put(sending)
        return sending

    def _run(self) -> None:
        while True:
            self._waiting.get().begin()
