from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time

import pytest
import torch

from paceline.core.errors import RankError
from paceline.dist.ring import Ring, ring_path
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig
from paceline.resilience.inject import Fault, FaultyWorld
from paceline.resilience.watch import Rings, Watcher, mesh_of, pids, verdict_path

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
MESH = MeshConfig(dp_replicate=2)
FAULT = Fault(kind="stop", rank=1, step=5)


@pytest.fixture
def watched(tmp_path):
    """Runs two ranks that add numbers up until a fault, and gives what the watcher has told."""

    def run(fault: Fault) -> list:
        found, told = [], threading.Event()

        def tell(verdict):
            found.append((verdict, pids(tmp_path)))
            for pid in pids(tmp_path).values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            told.set()

        def work(rank: int) -> None:
            world = FaultyWorld(MESH, rank, CPU, Ring(ring_path(tmp_path, rank), MESH, rank))
            world.faults = (fault,)
            world.begin_training()
            for step in range(1, 10_000):
                world.sum(torch.ones(3), ("dp_replicate",), purpose="test")
                time.sleep(0.01)
                world.finish_step(step)

        watcher = Watcher(tmp_path, MESH, 20.0, tell)
        watcher.start()
        with contextlib.suppress(RankError):
            run_ranks(work, 2, timeout_s=30, grace_s=1.0)
        assert told.wait(3.0)
        watcher.stop()
        return found

    return run


@pytest.mark.parametrize(("kind", "verdict"), [("stop", "hang"), ("crash", "crash")])
def test_the_rank_at_fault_is_told_of_once_and_written_down(watched, tmp_path, kind, verdict):
    ((found, processes),) = watched(Fault(kind=kind, rank=1, step=5))
    assert (found.kind, found.ranks) == (verdict, (1,))
    assert sorted(processes) == [0, 1]
    written = json.loads(verdict_path(tmp_path).read_text())
    assert (written["kind"], written["ranks"]) == (verdict, [1])
    assert written["evidence"] == found.evidence
    assert mesh_of(tmp_path) == MESH


def test_rings_of_an_earlier_start_are_left_out(tmp_path):
    old = Ring(ring_path(tmp_path, 0), MESH, 0)
    rings = Rings(tmp_path, since_s=time.time() + 0.01)
    assert rings.read(range(2), is_whole=True) == []
    time.sleep(0.02)
    new = Ring(ring_path(tmp_path, 0), MESH, 0)
    (trace,) = rings.read(range(2), is_whole=True)
    assert trace.process == "running"
    old.close("done")
    new.close("done")


def test_a_world_without_a_ring_is_watched_by_nobody(tmp_path):
    world = World(MeshConfig(), 0, CPU)
    with world.phase("saving"):
        world.begin_training()
        world.finish_step(1)
    assert mesh_of(tmp_path) is None
    assert pids(tmp_path) == {}


def test_a_sleeping_rank_and_a_slow_link_delay_and_change_nothing():
    mesh = MeshConfig(ep=2, dp_shard=2)

    def work(rank: int) -> tuple[list[list[float]], float]:
        world = FaultyWorld(mesh, rank, CPU)
        world.faults = (
            Fault(kind="slow", rank=0, destination=1, step=0, num_steps=2, time_s=0.2),
            Fault(kind="sleep", rank=1, step=2, time_s=0.3),
        )
        start_s, found = time.perf_counter(), []
        for step in range(3):
            rows = torch.arange(4.0) + 10 * rank + 100 * step
            found.append(world.all_to_all(rows, "ep", [2, 2], [2, 2], purpose="test").tolist())
            world.finish_step(step + 1)
        return found, time.perf_counter() - start_s

    (first, first_s), (second, second_s) = run_ranks(work, 2)
    assert first == [[100 * s + v for v in (0, 1, 10, 11)] for s in range(3)]
    assert second == [[100 * s + v for v in (2, 3, 12, 13)] for s in range(3)]
    assert min(first_s, second_s) > 2 * 0.2 + 0.3 - 0.05  # each held both of them up
