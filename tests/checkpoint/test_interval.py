from __future__ import annotations

import itertools
import random

import pytest

from paceline.checkpoint.base import SaveRecord
from paceline.checkpoint.interval import Costs, Interval, steps_between
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import CheckpointConfig

pytestmark = pytest.mark.cpu


def saved(step: int, time_s: float, write_s: float, level: str = "disk") -> SaveRecord:
    return SaveRecord(
        step=step, path="p", level=level, time_s=time_s, stall_s=0.0, write_s=write_s, size_bytes=1
    )


@pytest.mark.parametrize(
    ("costs", "share", "steps"),
    [
        (Costs(0.1, 0.0, 1.0, 1.0), 0.02, 5),  # 0.1 s of every 5
        (Costs(0.1, 0.1, 1.0, 1.0), 0.02, 10),
        (Costs(0.001, 0.0, 7.5, 1.0), 0.02, 8),  # the write is the longer
        (Costs(0.0, 0.0, 0.0, 1.0), 0.02, 1),
    ],
)
def test_steps_between_saves(costs, share, steps):
    assert steps_between(costs, share) == steps


@pytest.mark.parametrize("seed", range(20))
def test_the_overhead_stays_below_the_share_whatever_saves_cost(seed):
    """A run on a made-up clock, whose saves grow dearer half way."""
    import torch

    generator = random.Random(seed)
    share = generator.choice([0.01, 0.02, 0.1])
    config = CheckpointConfig(interval_steps="auto", overhead_share=share)
    interval = Interval(config, World(MeshConfig(), 0, torch.device("cpu")), 0)
    step_s, stood_s, write_s = 1.0, generator.uniform(0.0, 3.0), generator.uniform(0.1, 20.0)
    now_s = lost_s = 0.0
    counted_from, free_at_s = 200, 0.0
    pending: list[tuple[SaveRecord, float]] = []
    begins: list[int] = []
    for step in range(1, 6001):
        if step == 3000:
            stood_s *= 3.0
            counted_from = 3500
        is_counted = step >= 200 and not 3000 <= step < counted_from
        slowed_s = 0.2 if now_s < free_at_s else 0.0
        interval.note_step(step_s + slowed_s)
        now_s += step_s + slowed_s
        lost_s += slowed_s * is_counted
        done = [record for record, at_s in pending if now_s >= at_s]
        interval.note_saves(done)
        pending = [(record, at_s) for record, at_s in pending if now_s < at_s]
        if interval.is_due(step):
            interval.begin(step)
            begins.append(step)
            waited_s = max(0.0, free_at_s - now_s)  # for the save before
            now_s += waited_s + stood_s
            lost_s += (waited_s + stood_s) * is_counted
            free_at_s = now_s + write_s
            pending.append((saved(step, waited_s + stood_s, write_s), free_at_s))
    assert lost_s <= 1.25 * share * 6000 * step_s  # one save is as long as all slack
    assert begins[0] == 10
    pairs = list(itertools.pairwise(begins[3:]))
    # Never begun before the last is done, nor later than need be.
    assert all(after - before >= write_s for before, after in pairs)
    last = pairs[-1][1] - pairs[-1][0]
    assert last <= 2 + max(write_s, (stood_s + 0.2 * write_s) / share)


def test_a_number_of_steps_is_itself():
    import torch

    interval = Interval(
        CheckpointConfig(interval_steps=3), World(MeshConfig(), 0, torch.device("cpu")), 2
    )
    assert [step for step in range(3, 13) if interval.is_due(step)] == [3, 6, 9, 12]


@pytest.mark.ranks
def test_ranks_that_measure_otherwise_decide_alike():
    def work(rank: int) -> list[int]:
        import torch

        world = World(MeshConfig(dp_replicate=2), rank, torch.device("cpu"))
        interval = Interval(CheckpointConfig(interval_steps="auto"), world, 0)
        found = []
        for step in range(1, 200):
            interval.note_step(1.0 + 3 * rank)
            if interval.is_due(step):
                interval.begin(step)
                found.append(step)
                interval.note_saves([saved(step, 0.3 + rank, 2.0, "memory"), saved(step, 0.3, 2.0)])
        return found

    ours, theirs = run_ranks(work, 2)
    assert ours == theirs == [10, *range(20, 200, 15)]
    assert len(ours) > 8
