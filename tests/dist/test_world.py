from __future__ import annotations

import pytest
import torch

from paceline.core.errors import UsageError
from paceline.dist.collectives import Traffic, Transfer
from paceline.dist.testing import run_ranks
from paceline.dist.world import World, open_world
from paceline.plan.mesh import DATA_AXES, MeshConfig

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


@pytest.mark.ranks
def test_sums_run_over_the_ranks_that_differ_on_the_axes_alone():
    mesh = MeshConfig(dp_replicate=2, dp_shard=2)

    def work(rank: int) -> tuple[list[float], list[Transfer]]:
        world = World(mesh, rank, CPU)
        every_axes = (("dp_shard",), ("dp_replicate",), DATA_AXES, ("pp", "tp"), ("cp",))
        # Powers of two: a sum says which ranks are in it.
        tensors = [torch.full((3,), 2.0**rank) for _ in every_axes]
        sums = [
            world.sum(tensor, axes, purpose="a test")
            for tensor, axes in zip(tensors, every_axes, strict=True)
        ]
        assert all(total is tensor for total, tensor in zip(sums, tensors, strict=True))
        world.barrier()
        return [total[2].item() for total in sums], list(world.traffic.transfers)

    results = run_ranks(work, 4)
    assert [sums for sums, _ in results] == [
        [0b0011, 0b0101, 0b1111, 0b0001, 0b0001],
        [0b0011, 0b1010, 0b1111, 0b0010, 0b0010],
        [0b1100, 0b0101, 0b1111, 0b0100, 0b0100],
        [0b1100, 0b1010, 0b1111, 0b1000, 0b1000],
    ]
    for _, transfers in results:  # axes of degree 1 send nothing
        assert transfers == [
            Transfer("all-reduce", axes, 12, "a test")
            for axes in (("dp_shard",), ("dp_replicate",), DATA_AXES)
        ]


@pytest.mark.ranks
def test_data_indices_and_the_first_rank():
    mesh = MeshConfig(dp_replicate=2, dp_shard=2)

    def work(rank: int) -> tuple[int, bool, tuple[int, ...]]:
        world = World(mesh, rank, CPU)
        return world.data_index, world.is_first, tuple(world.device_mesh("dp_shard").mesh.tolist())

    assert run_ranks(work, 4) == [
        (0, True, (0, 1)),
        (1, False, (0, 1)),
        (2, False, (2, 3)),
        (3, False, (2, 3)),
    ]


def test_a_world_of_one_needs_no_group():
    world = World(MeshConfig(), 0, CPU)
    tensor = torch.ones(2)
    assert world.sum(tensor, DATA_AXES, purpose="a test") is tensor
    world.barrier()
    assert not world.traffic.transfers
    assert not torch.distributed.is_initialized()
    with pytest.raises(AssertionError, match="no device mesh"):
        world.device_mesh("dp_shard")


def test_a_plan_for_other_ranks_than_were_started_is_refused(monkeypatch):
    with (
        pytest.raises(UsageError, match=r"needs 2 rank\(s\), but 1 were started"),
        open_world(MeshConfig(dp_shard=2), CPU),
    ):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UsageError, match=r"needs 3 rank\(s\), but 2 were started") as caught,
        open_world(MeshConfig(dp_shard=3), CPU),
    ):
        pass
    assert caught.value.hint == "start 3 rank(s), or change [mesh] in the plan"


def test_alone_a_world_opens_without_a_launcher():
    with open_world(MeshConfig(), CPU) as world:
        assert (world.rank, world.data_index, world.is_first) == (0, 0, True)


def test_traffic_is_added_up_by_purpose():
    traffic = Traffic()
    traffic.add("all-reduce", ("dp_shard",), 8, "loss")
    traffic.add("all-reduce", DATA_AXES, 100, "gradients")
    traffic.add("all-reduce", DATA_AXES, 20, "gradients")
    assert traffic.total_bytes("gradients") == 120
    assert traffic.total_bytes("loss") == 8
    assert traffic.total_bytes("nothing") == 0


@pytest.mark.ranks
def test_rows_go_to_other_ranks_and_come_from_them():
    mesh = MeshConfig(dp_shard=3, ep=3)

    def work(rank: int) -> tuple[list[list[float]], list[Transfer]]:
        world = World(mesh, rank, CPU)
        sent = [rank, 2, 0]  # of which rank 0 sends none to itself
        received = [[0, 1, 2], [2, 2, 2], [0, 0, 0]][rank]
        rows = torch.full((sum(sent), 2), float(rank))
        found = world.all_to_all(rows, "ep", sent, received, purpose="a test")
        return found.tolist(), list(world.traffic.transfers)

    found = run_ranks(work, 3)
    rows = [[row[0] for row in came] for came, _ in found]
    assert rows == [[1.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0, 2.0, 2.0], []]
    leaving = [2, 1, 4]
    for (_, transfers), count in zip(found, leaving, strict=True):
        assert transfers == [Transfer("all-to-all", ("ep",), count * 2 * 4, "a test")]
    alone, rows = World(MeshConfig(), 0, CPU), torch.ones(2)
    assert alone.all_to_all(rows, "ep", [2], [2], purpose="a test") is rows


@pytest.mark.ranks
def test_sums_over_ranks_with_the_same_experts():
    mesh = MeshConfig(dp_replicate=2, dp_shard=2, tp=2, ep=2)

    def work(rank: int) -> list[float]:
        world = World(mesh, rank, CPU)
        tensors = [torch.tensor(2.0**rank) for _ in range(3)]
        axes = (("ep",), ("ep_replicate",), ("dp_replicate", "ep_replicate"))
        return [
            world.sum(tensor, of, purpose="a test").item()
            for tensor, of in zip(tensors, axes, strict=True)
        ]

    found = run_ranks(work, 8)
    assert found[0] == [0b11, 0b101, 0b1010101]
    assert found[7] == [0b11000000, 0b10100000, 0b10101010]
