"""`run_ranks`, on which all rank tests and `verify` stand."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from paceline.core.errors import RankError
from paceline.dist.p2p import PointToPoint
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

DOOMED_PARENT = """
import os, sys, time, torch
from paceline.dist.testing import run_ranks

def wait(rank):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
    time.sleep(60)

run_ranks(wait, 2)
"""


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_results_come_in_order_of_rank(num_ranks):
    def work(rank: int) -> dict[str, object]:
        time.sleep(0.05 * (num_ranks - rank))  # the last rank is done first
        total = torch.tensor(float(rank + 1))
        torch.distributed.all_reduce(total)
        return {"rank": rank, "total": total.item(), "array": np.full(1 << 18, rank)}

    results = run_ranks(work, num_ranks)
    assert [result["rank"] for result in results] == list(range(num_ranks))
    total = sum(range(1, num_ranks + 1))
    assert all(result["total"] == total for result in results)
    for rank, result in enumerate(results):  # more than a pipe's buffer holds
        np.testing.assert_array_equal(result["array"], np.full(1 << 18, rank))


def test_ranks_see_what_their_parent_holds_and_cannot_change_it():
    held = [1]

    def work(rank: int) -> int:
        held.append(rank)
        return sum(held)

    assert run_ranks(work, 2) == [1, 2]
    assert held == [1]


@pytest.mark.parametrize("guilty", [0, 1, 2])
def test_the_first_to_fail_is_named_with_its_traceback(guilty):
    def stumble() -> None:
        raise KeyError("the saddle")

    def work(rank: int) -> None:
        torch.distributed.barrier()
        if rank == guilty:
            stumble()
        torch.distributed.all_reduce(torch.ones(3))  # fails, once the guilty one is gone

    with pytest.raises(RankError, match=rf"^rank {guilty} failed:\n") as caught:
        run_ranks(work, 3)
    assert "in stumble" in str(caught.value)
    assert "KeyError: 'the saddle'" in str(caught.value)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_is_noticed_at_once(dying):
    def work(rank: int) -> None:
        torch.distributed.barrier()
        if rank == dying:
            os._exit(3)
        time.sleep(60)

    start_s = time.monotonic()
    with pytest.raises(RankError, match=f"rank {dying} died with exit code 3"):
        run_ranks(work, 2)
    assert time.monotonic() - start_s < 10


def test_a_rank_that_is_killed_is_told_from_what_it_makes_fail():
    def work(rank: int) -> None:
        torch.distributed.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.ones(3))

    with pytest.raises(RankError, match="rank 1 died with exit code -9"):
        run_ranks(work, 2)


@pytest.mark.parametrize("end", ["exception", "exit"])
@pytest.mark.parametrize("axis", ["pp", "tp", "dp_shard"])
def test_a_rank_is_named_with_its_place_on_the_mesh(axis, end):
    """The others wait for it: on a pipeline for a tensor, else in a collective."""
    mesh = MeshConfig(dp_replicate=2, **{axis: 2})

    def work(rank: int) -> None:
        world = World(mesh, rank, torch.device("cpu"))
        peers = PointToPoint(world, "pp", ("activations",))
        if rank == 3:
            if end == "exit":
                os._exit(7)
            raise KeyError("the saddle")
        if axis == "pp":
            peers.receive((1,), torch.float32, 1 - world.coordinate("pp"), "activations").wait()
        world.sum(torch.ones(3), (axis, "dp_replicate"), purpose="a test")

    place = "pp=1 dp_replicate=1" if axis == "pp" else f"dp_replicate=1 {axis}=1"
    how = "failed:\nTraceback" if end == "exception" else "died with exit code 7"
    start_s = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(work, 4, mesh=mesh)
    assert time.monotonic() - start_s < 10
    assert str(caught.value).startswith(f"rank 3 ({place}) {how}")


def test_late_ranks_are_named_and_ended(tmp_path, is_running):
    def work(rank: int) -> None:
        (tmp_path / f"rank-{rank}").write_text(str(os.getpid()))
        if rank != 1:
            time.sleep(60)

    with pytest.raises(RankError, match=r"rank\(s\) \[0, 2\] gave nothing in 1 s"):
        run_ranks(work, 3, timeout_s=1.0)
    assert not any(is_running(int(path.read_text())) for path in tmp_path.glob("rank-*"))
    assert len(list(tmp_path.glob("rank-*"))) == 3


def test_what_cannot_be_sent_is_an_error_of_its_rank():
    with pytest.raises(RankError, match="rank 0 failed"):
        run_ranks(lambda rank: lambda: rank, 1)


def test_ranks_compute_after_the_parent_has_used_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(512, 512) @ torch.ones(512, 512)  # starts OpenMP's pool
        (product,) = run_ranks(
            lambda _: torch.ones(512, 512).mm(torch.ones(512, 512)).sum().item(), 1
        )
    finally:
        torch.set_num_threads(before)
    assert product == 512.0**3


def test_ranks_end_with_a_parent_that_is_killed(start_python, is_running, ends_within):
    parent = start_python(DOOMED_PARENT)
    ranks = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(is_running(pid) for pid in ranks)
    parent.kill()
    assert all(ends_within(pid, 10) for pid in ranks)
