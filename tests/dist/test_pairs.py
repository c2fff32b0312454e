"""An all-to-all goes pair by pair where it can: the same rows and count, and times of pairs."""

from __future__ import annotations

import pytest
import torch

from paceline.dist.calls import Channel
from paceline.dist.collectives import Transfer
from paceline.dist.ring import Ring, RingReader, ring_path
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

MESH = MeshConfig(dp_shard=3, ep=3)
SENT = ((1, 0, 2), (3, 2, 0), (0, 1, 1))


def test_each_pair_is_seen_and_the_whole_is_counted_once(tmp_path):
    def work(rank: int) -> tuple[list[float], list[Transfer]]:
        ring = Ring(ring_path(tmp_path, rank), MESH, rank)
        world = World(MESH, rank, torch.device("cpu"), ring)
        rows = torch.arange(float(sum(SENT[rank]))) + 10 * rank
        received = [SENT[other][rank] for other in range(3)]
        found = world.all_to_all(rows, "ep", SENT[rank], received, purpose="rows")
        ring.close("done")
        return found.tolist(), list(world.traffic.transfers)

    results = run_ranks(work, 3)
    assert [found for found, _ in results] == [[0, 10, 11, 12], [13, 14, 20], [1, 2, 21]]
    for rank, (_, transfers) in enumerate(results):
        leaving = 4 * (sum(SENT[rank]) - SENT[rank][rank])
        assert transfers == [Transfer("all-to-all", ("ep",), leaving, "rows")]
    for rank in range(3):
        calls = RingReader(ring_path(tmp_path, rank)).read().calls
        pairs = {(c.operation, c.channel.members): c.size_bytes for c in calls if c.channel.is_way}
        own = {("send", (rank, other)): 4 * SENT[rank][other] for other in range(3)}
        own |= {("receive", (other, rank)): 4 * SENT[other][rank] for other in range(3)}
        # What is empty is not sent, and a rank sends itself nothing.
        expected = {k: size for k, size in own.items() if size and len(set(k[1])) == 2}
        assert pairs == expected
        (whole,) = (c for c in calls if not c.channel.is_way)
        assert (whole.operation, whole.channel) == ("all-to-all", Channel(("ep",), (0, 1, 2)))
        assert all(c.leave_s is not None for c in calls)


def test_every_collective_leaves_its_times(tmp_path):
    mesh = MeshConfig(dp_shard=2)

    def work(rank: int) -> None:
        ring = Ring(ring_path(tmp_path, rank), mesh, rank)
        world = World(mesh, rank, torch.device("cpu"), ring)
        data = ("dp_shard",)
        world.sum(torch.ones(2), data, purpose="sum")
        world.sum_start(torch.ones(2), data, purpose="start").wait()
        world.largest(torch.ones(2), "dp_shard", purpose="largest")
        world.gather(torch.ones(2), "dp_shard", purpose="gather")
        world.reduce_scatter(torch.ones(2), "dp_shard", purpose="scatter")
        world.collect(rank)
        world.barrier()
        ring.close("done")

    run_ranks(work, 2)
    calls = [RingReader(ring_path(tmp_path, rank)).read().calls for rank in range(2)]
    assert [c.operation for c in calls[0]] == [
        *("all-reduce", "all-reduce", "all-reduce", "all-gather", "reduce-scatter"),
        *("collect", "barrier"),
    ]
    for own in zip(*calls, strict=True):
        first, second = own
        assert (first.channel, first.sequence) == (second.channel, second.sequence)
        for call in own:
            assert call.wait_s is not None
            assert call.leave_s is not None
            assert call.enter_s <= call.wait_s <= call.leave_s
        # Nobody leaves before the other has come; both clocks are one.
        assert min(c.leave_s or 0.0 for c in own) >= max(c.enter_s for c in own)
