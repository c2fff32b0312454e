"""The order of data is a function of (seed, step), never of the layout."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from paceline.core.errors import UsageError
from paceline.data.batch import IGNORED, Batch
from paceline.data.loader import Loader
from paceline.data.store import TokenStore
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig

pytestmark = pytest.mark.cpu

LENGTH, NUM_ROWS, PER_STEP = 4, 30, 12
LAYOUTS = [
    MeshConfig(),
    MeshConfig(dp_shard=2),
    MeshConfig(dp_replicate=2),
    MeshConfig(dp_shard=3),
    MeshConfig(dp_replicate=2, dp_shard=2),
    MeshConfig(dp_replicate=3, dp_shard=4),
]


def store() -> TokenStore:
    """One document whose rows are told by their first token."""
    count = NUM_ROWS * LENGTH + 1
    return TokenStore(np.arange(count, dtype=np.uint32), np.array([count]))


def loader(
    mesh: MeshConfig | None = None, *, seed: int = 0, num_microbatches: int | None = None
) -> Loader:
    plan = Plan(
        mesh=mesh or MeshConfig(),
        train=TrainConfig(sequence_length=LENGTH, tokens_per_step=LENGTH * PER_STEP, seed=seed),
        pipeline=PipelineConfig(num_microbatches=num_microbatches),
    )
    return Loader(store(), plan, end_token=0)


def rows_of(batches: list[Batch]) -> list[int]:
    return [first // LENGTH for batch in batches for first in batch.tokens_BT[:, 0].tolist()]


def rows_of_step(source: Loader, step: int) -> Counter[int]:
    ranks = range(source.shape.num_data_ranks)
    return Counter(row for index in ranks for row in rows_of(source.microbatches(step, index)))


@pytest.mark.parametrize("mesh", LAYOUTS[1:])
def test_every_layout_reads_the_same_rows_in_a_step(mesh):
    for step in (1, 2, 3, 7):
        assert rows_of_step(loader(mesh), step) == rows_of_step(loader(), step)
        assert rows_of_step(loader(mesh), step).total() == PER_STEP


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 6])
def test_accumulation_cuts_a_rank_s_rows_and_changes_none(num_microbatches):
    whole = loader(MeshConfig(dp_shard=2)).microbatches(5, 1)
    cut = loader(MeshConfig(dp_shard=2), num_microbatches=num_microbatches).microbatches(5, 1)
    assert len(cut) == num_microbatches
    assert {batch.tokens_BT.shape for batch in cut} == {(6 // num_microbatches, LENGTH)}
    assert rows_of(cut) == rows_of(whole)


def test_a_step_is_the_same_whenever_and_by_whomever_it_is_read():
    first, second = loader(), loader()
    in_order = [rows_of(first.microbatches(step, 0)) for step in range(1, 9)]
    backwards = [rows_of(second.microbatches(step, 0)) for step in range(8, 0, -1)]
    assert in_order == backwards[::-1]
    again = loader().microbatches(6, 0)
    for batch, other in zip(again, first.microbatches(6, 0), strict=True):
        assert torch.equal(batch.tokens_BT, other.tokens_BT)
        assert torch.equal(batch.labels_BT, other.labels_BT)
        assert torch.equal(batch.documents_BT, other.documents_BT)


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_every_epoch_is_a_new_permutation(mesh):
    source = loader(mesh)
    ranks = range(source.shape.num_data_ranks)
    order = [
        row
        for step in range(1, 6)  # 60 rows: two epochs, whose border is inside step 3
        for index in ranks
        for row in rows_of(source.microbatches(step, index))
    ]
    epochs = [order[:NUM_ROWS], order[NUM_ROWS:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_ROWS))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1]


def test_another_seed_is_another_order():
    orders = [rows_of(loader(seed=seed).microbatches(1, 0)) for seed in range(4)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_batch_counts_its_labels():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    labels = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, 0]])
    batch = Batch(tokens, labels, torch.zeros(2, 3, dtype=torch.long))
    assert batch.count == 3
    moved = batch.to(torch.device("cpu"))
    assert moved.count == 3
    assert moved.labels_BT is labels


def test_less_text_than_a_row_is_refused():
    short = TokenStore(np.arange(4, dtype=np.uint32), np.array([4]))
    plan = Plan(train=TrainConfig(sequence_length=4, tokens_per_step=4))
    with pytest.raises(
        UsageError, match=r"the data has 4 tokens, fewer than .* of 4 \+ 1"
    ) as caught:
        Loader(short, plan, end_token=0)
    assert "shorter train.sequence_length" in caught.value.hint


def test_unpacked_rows_are_padded_with_the_end_token():
    data = TokenStore(np.array([5, 6, 0], dtype=np.uint32), np.array([3]))
    train = TrainConfig(sequence_length=4, tokens_per_step=4, pack=False)
    (batch,) = Loader(data, Plan(train=train), end_token=9).microbatches(1, 0)
    assert batch.tokens_BT.tolist() == [[5, 6, 0, 9]]
    assert batch.labels_BT.tolist() == [[6, 0, IGNORED, IGNORED]]
    assert batch.documents_BT.tolist() == [[0, 0, 0, -1]]
