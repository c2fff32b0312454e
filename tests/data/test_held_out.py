"""Held-out rows are the same ones on every layout, and ranks run as many passes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from paceline.data.batch import IGNORED
from paceline.data.held_out import HeldOut
from paceline.data.store import TokenStore
from paceline.data.tokens import Source
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig

pytestmark = pytest.mark.cpu

LENGTH, NUM_ROWS = 4, 30
PLANS = {
    "1 rank": (MeshConfig(), 1),
    "1 rank, large micro-batches": (MeshConfig(), 12),
    "2 ranks": (MeshConfig(dp_shard=2), 3),
    "4 ranks": (MeshConfig(dp_replicate=2, dp_shard=2), 1),
    "12 ranks": (MeshConfig(dp_shard=12), 1),
}


def held_out(case: str, eval_tokens: int, seed: int = 0) -> tuple[HeldOut, int]:
    mesh, size = PLANS[case]
    train = TrainConfig(
        sequence_length=LENGTH, tokens_per_step=LENGTH * 12, eval_tokens=eval_tokens, seed=seed
    )
    pipeline = PipelineConfig(num_microbatches=12 // mesh.num_ranks // size)
    count = NUM_ROWS * LENGTH + 1
    store = TokenStore(np.arange(count, dtype=np.uint32), np.array([count]))
    plan = Plan(mesh=mesh, train=train, pipeline=pipeline)
    return HeldOut(Source("src", (store,)), plan, end_token=0), mesh.num_ranks


def rows_in(case: str, eval_tokens: int, seed: int = 0) -> Counter[int]:
    """The rows that ranks read, told by their first label."""
    source, num_ranks = held_out(case, eval_tokens, seed)
    per_rank = [list(source.batches(index)) for index in range(num_ranks)]
    assert len({len(batches) for batches in per_rank}) == 1
    assert {tuple(b.tokens_BT.shape) for batches in per_rank for b in batches} == {
        (PLANS[case][1], LENGTH)
    }
    labels = [row for batches in per_rank for b in batches for row in b.labels_BT[:, 0].tolist()]
    return Counter(label // LENGTH for label in labels if label != IGNORED)


@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize(
    ("eval_tokens", "num_rows"), [(1, 1), (LENGTH, 1), (27, 6), (52, 13), (10_000, NUM_ROWS)]
)
def test_every_layout_reads_the_same_rows_each_once(case, eval_tokens, num_rows):
    found = rows_in(case, eval_tokens)
    assert found.total() == len(found) == num_rows
    assert found == rows_in("1 rank", eval_tokens)
    assert found == rows_in(case, eval_tokens)


def test_the_rows_are_spread_over_the_data():
    chosen = rows_in("1 rank", 10 * LENGTH)
    assert max(chosen) > 15
    assert chosen != rows_in("1 rank", 10 * LENGTH, seed=1)
