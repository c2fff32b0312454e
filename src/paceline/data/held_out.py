"""Held-out rows: the same ones at every evaluation, whatever the layout."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core import rng
from paceline.data.batch import Batch
from paceline.data.rows import as_batch, padding_row, rows_of
from paceline.data.tokens import Source
from paceline.plan.batch import batch_shape
from paceline.plan.plan import Plan


class HeldOut:
    """Gives each data rank its share of the held-out rows.

    Which rows these are follows from `train.seed`, `train.eval_tokens` and the data alone. Ranks
    whose share is smaller get rows of padding, so that all run the same number of forward passes.

    Args:
        source: the held-out data.
        plan: sizes and seed.
        end_token: fills rows that are padded.

    Raises:
        UsageError: less text than one row, or a document that is too long.
    """

    def __init__(self, source: Source, plan: Plan, *, end_token: int) -> None:
        config = plan.train
        self._rows = rows_of(source, config, pad_token=end_token)
        self._padding = padding_row(config.sequence_length, end_token)
        order = rng.permutation(len(self._rows), seed=config.seed, purpose="held-out rows")
        self._chosen = order[: max(1, config.eval_tokens // config.sequence_length)]
        self._shape = batch_shape(plan)

    def batches(self, data_index: int) -> Iterator[Batch]:
        """The batches of one rank, as many on each.

        Args:
            data_index: which of the data ranks, from 0.
        """
        size = self._shape.microbatch_sequences
        per_rank = -(-len(self._chosen) // self._shape.num_data_ranks)
        per_rank = -(-per_rank // size) * size
        first = data_index * per_rank
        for start in range(first, first + per_rank, size):
            rows = [self._rows[int(row)] for row in self._chosen[start : start + size]]
            yield as_batch([*rows, *[self._padding] * (size - len(rows))])
