from __future__ import annotations

import pytest
import torch

from paceline.dist.collectives import Transfer
from paceline.dist.p2p import PointToPoint
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CPU = torch.device("cpu")
PURPOSES = ("activations", "gradients")


def test_tensors_arrive_in_the_order_of_their_purpose_whatever_is_received_first():
    def work(rank: int) -> list[list[float]]:
        peers = PointToPoint(World(MeshConfig(pp=2), rank, CPU), "pp", PURPOSES)
        if rank == 0:
            for value in (1.0, 2.0):
                peers.send(torch.full((2,), value), 1, "activations")
            peers.send(torch.full((1,), 3.0), 1, "gradients")
            back = peers.receive((3,), torch.float64, 1, "activations").wait()
            peers.finish()
            return [back.tolist()]
        gradient = peers.receive((1,), torch.float32, 0, "gradients")
        first = peers.receive((2,), torch.float32, 0, "activations")
        second = peers.receive((2,), torch.float32, 0, "activations")
        found = [gradient.wait().tolist(), second.wait().tolist(), first.wait().tolist()]
        peers.send(torch.arange(6, dtype=torch.float64).view(2, 3).t()[:, 1], 0, "activations")
        peers.finish()
        return found

    assert run_ranks(work, 2) == [[[3.0, 4.0, 5.0]], [[3.0], [2.0, 2.0], [1.0, 1.0]]]


def test_ranks_send_each_other_at_the_same_time():
    """Both send megabytes before either receives: no send waits for its receive."""

    def work(rank: int) -> float:
        peers = PointToPoint(World(MeshConfig(pp=2), rank, CPU), "pp", PURPOSES)
        for _ in range(3):
            peers.send(torch.full((1 << 20,), float(rank)), 1 - rank, "activations")
        shape = (1 << 20,)
        found = [peers.receive(shape, torch.float32, 1 - rank, "activations") for _ in range(3)]
        total = sum(float(pending.wait().mean()) for pending in found)
        peers.finish()
        return total

    assert run_ranks(work, 2) == [3.0, 0.0]


@pytest.mark.parametrize("axis", ["pp", "dp_shard", "tp"])
def test_a_ring_on_one_axis_and_its_traffic(axis):
    mesh = MeshConfig(**{axis: 3, "dp_replicate": 2})

    def work(rank: int) -> tuple[int, list[Transfer]]:
        world = World(mesh, rank, CPU)
        peers = PointToPoint(world, axis, ("tokens",))
        index = world.mesh.coordinate(rank)[axis]
        peers.send(torch.tensor([rank]), (index + 1) % 3, "tokens")
        found = int(peers.receive((1,), torch.int64, (index - 1) % 3, "tokens").wait())
        peers.finish()
        return found, list(world.traffic.transfers)

    results = run_ranks(work, 6)
    for rank, (found, transfers) in enumerate(results):
        own, sender = mesh.coordinate(rank), mesh.coordinate(found)
        assert sender.pop(axis) == (own.pop(axis) - 1) % 3
        assert sender == own
        assert transfers == [
            Transfer("send", (axis,), 8, "tokens"),
            Transfer("receive", (axis,), 8, "tokens"),
        ]


def test_a_sent_tensor_lives_until_it_has_been_taken():
    def work(rank: int) -> float:
        peers = PointToPoint(World(MeshConfig(pp=2), rank, CPU), "pp", ("activations",))
        if rank == 0:
            for value in range(8):
                peers.send(torch.full((1 << 18,), float(value)), 1, "activations")
            torch.zeros(8 << 18).fill_(99.0)  # takes the memory of what has been freed
            peers.finish()
            return 0.0
        shape = (1 << 18,)
        found = [peers.receive(shape, torch.float32, 0, "activations") for _ in range(8)]
        return float(sum(pending.wait().double().mean() for pending in found))

    assert run_ranks(work, 2)[1] == sum(range(8))


def test_an_axis_of_one_has_nobody_to_talk_to():
    peers = PointToPoint(World(MeshConfig(), 0, CPU), "pp", PURPOSES)
    peers.finish()
    with pytest.raises(AssertionError, match="sends itself nothing"):
        peers.send(torch.ones(1), 0, "activations")


def test_an_unknown_purpose_is_an_error():
    def work(rank: int) -> str:
        peers = PointToPoint(World(MeshConfig(pp=2), rank, CPU), "pp", ("activations",))
        with pytest.raises(KeyError) as caught:
            peers.send(torch.ones(1), 1 - rank, "gradients")
        return str(caught.value)

    assert all("gradients" in text for text in run_ranks(work, 2))
