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
from paceline.data.tokens import Source
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


# Mixtures. Documents are examples of one row each, told by their first token.


def examples(name: str, first: int, count: int, weight: float) -> Source:
    """`count` examples of three tokens, numbered from `first`."""
    tokens = np.repeat(np.arange(first, first + count, dtype=np.uint32), LENGTH - 1)
    ends = np.arange(1, count + 1) * (LENGTH - 1)
    starts = ends - (LENGTH - 1)
    return Source(name, (TokenStore(tokens, ends, np.stack([starts, ends], axis=1)),), "", weight)


MIXTURE = [examples("a", 1000, 70, 0.5), examples("b", 2000, 24, 0.3), examples("c", 3000, 9, 0.2)]


def mixture_loader(mesh: MeshConfig | None = None, sources: list[Source] = MIXTURE) -> Loader:
    train = TrainConfig(sequence_length=LENGTH, tokens_per_step=LENGTH * PER_STEP)
    return Loader(sources, Plan(mesh=mesh or MeshConfig(), train=train), end_token=0)


def documents_of_step(loader: Loader, step: int) -> list[int]:
    ranks = range(loader.shape.num_data_ranks)
    batches = [batch for index in ranks for batch in loader.microbatches(step, index)]
    return [int(token) for batch in batches for token in batch.tokens_BT[:, 0]]


@pytest.mark.parametrize("mesh", [MeshConfig(dp_shard=n) for n in (1, 2, 4)])
@pytest.mark.parametrize("stopped_at", [1, 2, 5])
def test_a_run_resumed_on_any_layout_reads_what_is_left_of_the_epoch_once(mesh, stopped_at):
    """Source b has 24 documents at 0.3 of the rows: its epoch is 80 rows, in the seventh step."""
    before = mixture_loader()
    read = [d for step in range(1, stopped_at + 1) for d in documents_of_step(before, step)]
    resumed = mixture_loader(mesh)
    left = [d for step in range(stopped_at + 1, 8) for d in documents_of_step(resumed, step)]
    for source, first, count in (("a", 1000, 70), ("b", 2000, 24)):
        seen = [d for d in read if first <= d < first + 1000]
        then = [d for d in left if first <= d < first + 1000]
        unread = set(range(first, first + count)) - set(seen)
        assert 0 < len(unread) < count, source
        assert len(seen) == len(set(seen))
        rest = then[: len(unread)]
        if source == "a":  # whose epoch goes on after these steps
            assert len(then) == len(set(then))
            assert set(then) < unread
        else:
            assert set(rest) == unread
    # A layout decides who reads a row, never which rows are read.
    assert sorted(left) == sorted(
        d for step in range(stopped_at + 1, 8) for d in documents_of_step(mixture_loader(), step)
    )


def test_every_source_of_a_mixture_runs_through_epochs_of_its_own():
    loader = mixture_loader()
    order = [d for step in range(1, 41) for d in documents_of_step(loader, step)]
    for first, count in ((1000, 70), (2000, 24), (3000, 9)):
        own = [d for d in order if first <= d < first + 1000]
        epochs = [own[i : i + count] for i in range(0, len(own) - count + 1, count)]
        assert len(epochs) > 2
        assert all(sorted(epoch) == list(range(first, first + count)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_sources_of_one_size_have_orders_of_their_own():
    sources = [examples("a", 1000, 12, 1.0), examples("b", 2000, 12, 1.0)]
    loader = mixture_loader(sources=sources)
    order = [d for step in range(1, 11) for d in documents_of_step(loader, step)]
    orders = [[d % 1000 for d in order if d // 1000 == number] for number in (1, 2)]
    epochs = {tuple(own[i : i + 12]) for own in orders for i in range(0, 60, 12)}
    assert len(epochs) == 10


def test_weights_are_shares_of_rows():
    order = [d // 1000 for step in range(1, 41) for d in documents_of_step(mixture_loader(), step)]
    for start in range(0, len(order), 10):
        block = Counter(order[start : start + 10])
        assert block == {1: 5, 2: 3, 3: 2}


def test_the_weight_of_the_only_source_changes_nothing():
    alone = [mixture_loader(sources=[examples("a", 1000, 70, weight)]) for weight in (0.5, 7.0)]
    orders = [[d for step in range(1, 6) for d in documents_of_step(a, step)] for a in alone]
    assert orders[0] == orders[1]
    assert len(set(orders[0])) == 60


def test_a_source_of_a_mixture_that_is_too_short_is_named():
    short = Source("short.txt", (TokenStore(np.arange(4, dtype=np.uint32), np.array([4])),))
    with pytest.raises(UsageError, match=r"short\.txt has 4 tokens"):
        mixture_loader(sources=[MIXTURE[0], short])
