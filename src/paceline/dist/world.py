"""The world of a run: this process's rank, the mesh around it, and its groups."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from paceline.core.env import rank_environment
from paceline.core.errors import PacelineError, RankError, UsageError
from paceline.dist.calls import Phase
from paceline.dist.collectives import Pending, Traffic
from paceline.dist.compat import all_gather, reduce_scatter
from paceline.dist.failure import hand_over, is_peer_gone
from paceline.dist.ring import Ring, members_of, ring_path
from paceline.plan.mesh import AXES, DATA_AXES, MeshConfig

T = TypeVar("T")


class Sending(Protocol):
    """A tensor that is being sent, as torch's ``Work`` tells of it."""

    def is_completed(self) -> bool: ...

    def wait(self) -> object: ...


_TIMEOUT = timedelta(minutes=10)
# A user should read the first error and no other. Where ranks speak for themselves, one that fails
# leaves time to its launcher, which ends it without a word once another has failed and said why.
_PATIENCE_S = 5.0


class World:
    """One rank's view of a run. A world of one rank needs no process group.

    Args:
        mesh: degrees of parallelism; their product is the number of ranks.
        rank: this process's rank.
        device: where this rank computes.
        ring: gets the times of its collectives; absent: nobody watches.

    Attributes:
        traffic: what this rank has sent, for comparison with cost models.
    """

    def __init__(
        self, mesh: MeshConfig, rank: int, device: torch.device, ring: Ring | None = None
    ) -> None:
        self.mesh = mesh
        self.rank = rank
        self.device = device
        self.traffic = Traffic(ring)
        self._coordinate = mesh.coordinate(rank) | mesh.expert_coordinate(rank)
        self._device_mesh: DeviceMesh | None = None
        self._groups: dict[tuple[str, ...], torch.distributed.ProcessGroup] = {}
        if mesh.num_ranks > 1:
            self._device_mesh = init_device_mesh(device.type, mesh.shape, mesh_dim_names=AXES)
            self._groups[DATA_AXES] = make_group(mesh, rank, DATA_AXES)
        if mesh.ep > 1:
            for axis in ("ep", "ep_replicate"):
                self._groups[axis,] = make_group(mesh, rank, (axis,))

    @property
    def is_first(self) -> bool:
        """Whether this rank prints, and commits what all have written."""
        return self.rank == 0

    @property
    def data_index(self) -> int:
        """Which share of each batch this rank reads."""
        return self.mesh.data_index(self.rank)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The part of the mesh along some axes, for torch's own parallelism."""
        assert self._device_mesh is not None, "a world of one rank has no device mesh"
        return self._device_mesh[axes]

    def degree(self, axis: str) -> int:
        """How many ranks there are along an axis of the mesh, as `coordinate` has them."""
        return getattr(self.mesh, axis)

    def coordinate(self, axis: str) -> int:
        """Where this rank is along an axis of the mesh, ``ep`` and ``ep_replicate`` among them."""
        return self._coordinate[axis]

    def sum(self, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Tensor:
        """Sums a tensor in place over the ranks that differ only on `axes`, and returns it.

        Both data axes are one step, every other axis one of its own.
        """
        for step in _steps(axes):
            if any(self.degree(axis) > 1 for axis in step):
                call = self.traffic.enter("all-reduce", step, tensor.nbytes, purpose)
                torch.distributed.all_reduce(tensor, group=self._group(step))
                self.traffic.leaves(call)
        return tensor

    def sum_start(self, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Pending:
        """Starts to sum a tensor in place over the ranks that differ only on `axes`.

        Args:
            tensor: neither read nor written by anyone until the sum has been waited for.
            axes: one, or both data axes.
            purpose: written down with the tensor's bytes.
        """
        if all(self.degree(axis) == 1 for axis in axes):
            return Pending(None)
        call = self.traffic.enter("all-reduce", axes, tensor.nbytes, purpose, waits=False)
        work = torch.distributed.all_reduce(tensor, group=self._group(axes), async_op=True)
        return Pending(work, self.traffic, call)

    def largest(self, tensor: Tensor, axis: str, *, purpose: str) -> Tensor:
        """The largest of each element over the ranks along an axis, in place."""
        if self.degree(axis) > 1:
            call = self.traffic.enter("all-reduce", (axis,), tensor.nbytes, purpose)
            torch.distributed.all_reduce(
                tensor, torch.distributed.ReduceOp.MAX, group=self._group((axis,))
            )
            self.traffic.leaves(call)
        return tensor

    def gather(self, tensor: Tensor, axis: str, *, purpose: str) -> Tensor:
        """The tensors of the ranks along an axis, in their order, end to end along dimension 0.

        Args:
            tensor: of the same shape on every rank.
            axis: of the mesh.
            purpose: written down with the bytes of the result.
        """
        degree = self.degree(axis)
        if degree == 1:
            return tensor
        whole = tensor.new_empty(degree * tensor.shape[0], *tensor.shape[1:])
        call = self.traffic.enter("all-gather", (axis,), whole.nbytes, purpose)
        all_gather(whole, tensor.contiguous(), group=self._group((axis,)))
        self.traffic.leaves(call)
        return whole

    def reduce_scatter(self, tensor: Tensor, axis: str, *, purpose: str) -> Tensor:
        """This rank's part of the sum of a tensor over the ranks along an axis.

        Args:
            tensor: of the same shape on every rank; dimension 0 is cut into equal parts.
            axis: of the mesh.
            purpose: written down with the bytes of `tensor`.
        """
        degree = self.degree(axis)
        if degree == 1:
            return tensor
        part = tensor.new_empty(tensor.shape[0] // degree, *tensor.shape[1:])
        call = self.traffic.enter("reduce-scatter", (axis,), tensor.nbytes, purpose)
        reduce_scatter(part, tensor.contiguous(), group=self._group((axis,)))
        self.traffic.leaves(call)
        return part

    def all_to_all(
        self,
        rows: Tensor,
        axis: str,
        sent: Sequence[int],
        received: Sequence[int],
        *,
        purpose: str,
    ) -> Tensor:
        """Gives each rank along an axis some rows of a tensor, and takes what each gives.

        Args:
            rows: sorted by the rank that they go to.
            axis: of the mesh.
            sent: how many rows go to each rank.
            received: how many come from each.
            purpose: written down with the bytes of the rows that leave this rank.

        Returns:
            What has come, in the order of the ranks that it has come from.
        """
        if self.degree(axis) == 1:
            return rows
        return self._all_to_all(rows, (axis,), sent, received, purpose)

    def exchange(
        self, elements: Tensor, sent: Sequence[int], received: Sequence[int], *, purpose: str
    ) -> Tensor:
        """Gives every rank of the world some elements, and takes what each gives.

        Args:
            elements: sorted by the rank that they go to.
            sent: how many go to each rank; none to this one.
            received: how many come from each.
            purpose: written down with the bytes that leave this rank.

        Returns:
            What has come, in order of rank.
        """
        if self.mesh.num_ranks == 1:
            return elements
        return self._all_to_all(elements, (), sent, received, purpose)

    def _all_to_all(
        self,
        rows: Tensor,
        axes: tuple[str, ...],
        sent: Sequence[int],
        received: Sequence[int],
        purpose: str,
    ) -> Tensor:
        """Among the ranks that differ on some axes; of no axes: all ranks."""
        index = self.coordinate(axes[0]) if axes else self.rank
        found = rows.new_empty(sum(received), *rows.shape[1:])
        leaving = len(rows) - sent[index]
        call = self.traffic.enter("all-to-all", axes, rows[:leaving].nbytes, purpose)
        if axes and self.device.type == "cpu":
            # Gloo does the same inside; here it is seen how long each pair takes.
            given = rows.contiguous().split(list(sent))
            self._exchange(given, found.split(list(received)), axes[0], purpose)
        else:
            group = self._group(axes) if axes else None
            torch.distributed.all_to_all_single(
                found, rows.contiguous(), list(received), list(sent), group=group
            )
        self.traffic.leaves(call)
        return found

    def collect(self, value: T) -> list[T]:
        """What every rank gives, plain data, in order of rank."""
        if self.mesh.num_ranks == 1:
            return [value]
        found: list[T] = [value] * self.mesh.num_ranks
        call = self.traffic.enter_uncounted("collect", "plain data")
        torch.distributed.all_gather_object(found, value)
        self.traffic.leaves(call)
        return found

    def group(self, axes: tuple[str, ...]) -> torch.distributed.ProcessGroup:
        """The ranks that differ from this one only on some axes, for torch's own parallelism.

        Args:
            axes: one, or both data axes.
        """
        return self._group(axes)

    def send_start(
        self, tensor: Tensor, group: torch.distributed.ProcessGroup, destination: int
    ) -> Sending:
        """Begins to send a dense tensor to a member of a group; all that is sent begins here.

        Args:
            tensor: nobody may change it before the sending has been waited for.
            group: both are in it.
            destination: the index of the other rank in the group.
        """
        work = torch.distributed.isend(tensor, group=group, group_dst=destination)
        assert work is not None, "this rank is not in the group"
        return work

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        if self.mesh.num_ranks > 1:
            call = self.traffic.enter_uncounted("barrier", "barrier")
            torch.distributed.barrier()
            self.traffic.leaves(call)

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """This rank is at something that takes as long as it takes: who watches is patient."""
        ring = self.traffic.ring
        return nullcontext() if ring is None else ring.phase(phase)

    def begin_training(self) -> None:
        """The first step begins."""
        if self.traffic.ring is not None:
            self.traffic.ring.begin_training()

    def finish_step(self, step: int) -> None:
        """A step has ended, and the next one begins."""
        if self.traffic.ring is not None:
            self.traffic.ring.finish_step(step)

    def _exchange(
        self, given: Sequence[Tensor], found: Sequence[Tensor], axis: str, purpose: str
    ) -> None:
        """An all-to-all, pair by pair, each rank beginning with its next one.

        Args:
            given: to each rank along the axis; what is empty is not sent.
            found: of each, to be filled in.
            axis: of the mesh.
            purpose: of all of it.
        """
        group, index = self._group((axis,)), self.coordinate(axis)
        ranks = members_of(self.mesh, self.rank, (axis,))
        begun: list[tuple[Sending, int]] = []
        found[index].copy_(given[index])
        for distance in range(1, len(ranks)):
            to, of = (index + distance) % len(ranks), (index - distance) % len(ranks)
            if found[of].numel():
                ends = ranks[of], self.rank
                call = self._enter_pair("receive", axis, ends, found[of], purpose)
                work = torch.distributed.irecv(found[of], group=group, group_src=of)
                assert work is not None, "this rank is not in the group"
                begun.append((work, call))
            if given[to].numel():
                ends = self.rank, ranks[to]
                call = self._enter_pair("send", axis, ends, given[to], purpose)
                begun.append((self.send_start(given[to], group, to), call))
        for work, call in begun:
            self.traffic.waits(call)
            work.wait()
            self.traffic.leaves(call)

    def _enter_pair(
        self, operation: str, axis: str, ends: tuple[int, int], tensor: Tensor, purpose: str
    ) -> int:
        traffic, size_bytes = self.traffic, tensor.nbytes
        return traffic.enter_way(operation, axis, ends, size_bytes, purpose, is_counted=False)

    def _group(self, axes: tuple[str, ...]) -> torch.distributed.ProcessGroup:
        if axes in self._groups:
            return self._groups[axes]
        return self.device_mesh(*axes).get_group()


def _steps(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The axes in the groups that there are: the data axes as one where both are wanted."""
    if not set(DATA_AXES) <= set(axes):
        return [(axis,) for axis in axes]
    return [DATA_AXES, *((axis,) for axis in axes if axis not in DATA_AXES)]


def join_ranks(mesh: MeshConfig, device: torch.device) -> int:
    """Joins the ranks that a launcher has started, unless a process group is up; alone where
    there is neither.

    Args:
        mesh: what the plan asks for.
        device: where this rank computes.

    Returns:
        This process's rank.

    Raises:
        UsageError: the number of ranks is not the mesh's.
    """
    rank, num_ranks = _place()
    if num_ranks != mesh.num_ranks:
        raise UsageError(
            f"the plan needs {mesh.num_ranks} rank(s), but {num_ranks} were started",
            hint=f"start {mesh.num_ranks} rank(s), or change [mesh] in the plan",
        )
    if num_ranks > 1 and not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
    return rank


@contextmanager
def open_world(
    mesh: MeshConfig, device: torch.device, *, watched: Path | None = None
) -> Generator[World]:
    """Joins the ranks as `join_ranks` does, and leaves them at the end.

    Args:
        mesh: what the plan asks for.
        device: where this rank computes.
        watched: a run's folder, where each rank leaves the times of its collectives.

    Raises:
        UsageError: the number of ranks is not the mesh's.
        RankError: another rank is gone.
    """
    is_joined = torch.distributed.is_initialized()
    rank = join_ranks(mesh, device)
    ring = None if watched is None else Ring(ring_path(watched, rank), mesh, rank)
    try:
        yield World(mesh, rank, device, ring)
    except Exception as error:
        is_lost = is_peer_gone(error)
        if ring is not None:
            ring.close("lost" if is_lost else "failed")
        if mesh.num_ranks == 1:
            raise
        # The group is left as it is: taking it down could wait for ranks that are stuck.
        name = mesh.name_rank(rank)
        error.add_note(f"on {name}")
        hand_over(error)
        if is_lost or rank:  # of an error that all ranks see, the first rank tells
            time.sleep(_PATIENCE_S)
        if is_lost:
            raise RankError(f"{name} has lost another rank: {error}") from error
        if isinstance(error, PacelineError):
            error.message = f"{name}: {error.message}"
        raise
    if ring is not None:
        ring.close("done")
    if mesh.num_ranks > 1 and not is_joined:
        torch.distributed.destroy_process_group()


def _place() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    environment = rank_environment()
    return (environment.rank, environment.world_size) if environment else (0, 1)


def make_group(
    mesh: MeshConfig, rank: int, axes: tuple[str, ...]
) -> torch.distributed.ProcessGroup:
    """The group of ranks that differ from `rank` only on `axes`; every rank makes every group."""
    made = {members: torch.distributed.new_group(list(members)) for members in mesh.groups(axes)}
    mine = next(group for members, group in made.items() if rank in members)
    assert isinstance(mine, torch.distributed.ProcessGroup), f"rank {rank} is not in its group"
    return mine
