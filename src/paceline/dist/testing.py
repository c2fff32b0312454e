"""Worlds for tests and for `verify`: forked gloo ranks, a tenth of a second to start."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from paceline.core.errors import RankError
from paceline.dist.collectives import Pending
from paceline.dist.launch import end_with_parent
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig

_POLL_S = 0.01


def run_ranks(
    function: Callable[[int], Any],
    num_ranks: int,
    *,
    timeout_s: float = 120.0,
    mesh: MeshConfig | None = None,
    grace_s: float = 0.0,
) -> list[Any]:
    """Runs ``function(rank)`` on forked gloo ranks and returns what each gave, in order of rank.

    What it gives must be plain data or numpy arrays. The process group is up when it is called.

    Args:
        function: of the rank.
        num_ranks: how many.
        timeout_s: for all of it.
        mesh: of the ranks, so that errors say where a rank is on it.
        grace_s: how long the others have, once one has failed, to end of themselves.

    Raises:
        RankError: a rank failed or took too long; the others are ended, and the first to fail is
            named with its traceback.
    """
    # DTensor imports it at its first use, for a second: here once, and not in every rank.
    importlib.import_module("torch._dynamo")
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="paceline-ranks-") as folder:
        receivers: list[Connection] = []
        processes: list[BaseProcess] = []
        try:
            for rank in range(num_ranks):
                # Made just before its rank is forked, so that no other rank holds its writing
                # end: then the death of a rank closes its pipe.
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank,
                    args=(function, rank, num_ranks, os.path.join(folder, "store"), sender),
                    daemon=True,
                )
                process.start()
                sender.close()
                receivers.append(receiver)
                processes.append(process)
            name_rank = mesh.name_rank if mesh else "rank {}".format
            return _collect(receivers, processes, timeout_s, name_rank, grace_s)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(
    function: Callable[[int], Any], rank: int, num_ranks: int, store: str, sender: Connection
) -> None:
    torch.set_num_threads(1)  # first of all: a forked child hangs in its parent's OpenMP pool
    end_with_parent()
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks
        )
        sender.send((True, function(rank), time.monotonic()))
        torch.distributed.destroy_process_group()
    except BaseException:
        sender.send((False, traceback.format_exc(), time.monotonic()))
    finally:
        sender.close()
        os._exit(0)  # no handlers of the parent's: pytest and CUDA have some


class _Failure(NamedTuple):
    """How a rank failed; the least of several is the first."""

    time_s: float
    message: str


def _collect(
    receivers: Sequence[Connection],
    processes: Sequence[BaseProcess],
    timeout_s: float,
    name_rank: Callable[[int], str],
    grace_s: float,
) -> list[Any]:
    results: dict[int, Any] = {}
    failed_s: float | None = None
    deadline_s = time.monotonic() + timeout_s
    while len(results) < len(receivers):
        failures = [r for r in results.values() if isinstance(r, _Failure)]
        for rank, receiver in enumerate(receivers):
            if rank not in results and receiver.poll():
                results[rank] = _receive(name_rank(rank), receiver, processes[rank])
        if failures:  # looked once more since: a failure makes others fail
            failed_s = failed_s or time.monotonic()
            if time.monotonic() >= failed_s + grace_s:
                break
        if time.monotonic() > deadline_s:
            late = [rank for rank in range(len(receivers)) if rank not in results]
            raise RankError(f"rank(s) {late} gave nothing in {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    if failures := [r for r in results.values() if isinstance(r, _Failure)]:
        raise RankError(min(failures).message)
    return [results[rank] for rank in range(len(receivers))]


def _receive(name: str, receiver: Connection, process: BaseProcess) -> Any:
    """What a rank gave, or how it failed."""
    try:
        succeeded, result, time_s = receiver.recv()
    except EOFError:
        process.join()
        # A rank that dies leaves no time; its death comes before whatever it makes fail.
        return _Failure(0.0, f"{name} died with exit code {process.exitcode}")
    return result if succeeded else _Failure(time_s, f"{name} failed:\n{result}")


class SlowWorld(World):
    """A world whose sums over ranks take longer, as over a slow link; its other collectives do not.

    Attributes:
        latency_s: that each sum takes beyond its own time; changed at any moment.
        num_sums: that have been begun.
        waited_s: that this rank has been held up by latencies, its own sums' at once in full.
    """

    latency_s: float = 0.0
    num_sums: int = 0
    waited_s: float = 0.0

    def sum(self, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Tensor:
        before = self.traffic.count
        super().sum(tensor, axes, purpose=purpose)
        begun = self.traffic.count - before
        self.num_sums += begun
        self.wait_until(time.perf_counter() + begun * self.latency_s)
        return tensor

    def sum_start(self, tensor: Tensor, axes: tuple[str, ...], *, purpose: str) -> Pending:
        begun = super().sum_start(tensor, axes, purpose=purpose)
        self.num_sums += begun.work is not None
        return begun if begun.work is None else _LatePending(begun.work, self, begun.number)

    def wait_until(self, time_s: float) -> None:
        """Holds this rank up until a moment of `time.perf_counter`."""
        left_s = max(0.0, time_s - time.perf_counter())
        self.waited_s += left_s
        time.sleep(left_s)


class _LatePending(Pending):
    """A collective whose result is there some time after it is done, waited for or not."""

    def __init__(self, work: torch.distributed.Work, world: SlowWorld, number: int) -> None:
        super().__init__(work, world.traffic, number)
        self._world, self._latency_s = world, world.latency_s
        self._done_s: float | None = None
        work.get_future().add_done_callback(self._note_end)

    def wait(self) -> None:
        if self.work is None:
            return
        super().wait()
        done_s = time.perf_counter() if self._done_s is None else self._done_s
        self._world.wait_until(done_s + self._latency_s)

    def _note_end(self, _future: object) -> None:
        self._done_s = time.perf_counter()
