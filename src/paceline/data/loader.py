"""Batches as a function of (seed, step): there is no state but the step."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.core import rng
from paceline.core.errors import UsageError
from paceline.data.batch import Batch
from paceline.data.rows import DocumentRows, PackedRows, Rows
from paceline.data.tokens import TokenStore
from paceline.plan.batch import BatchShape, batch_shape
from paceline.plan.plan import Plan


class Loader:
    """Gives each rank its micro-batches of each step.

    Step s, from 1, reads rows ``(s - 1) * n`` to ``s * n - 1`` of an endless sequence in which
    every epoch is a new permutation of all rows; which rank reads which of them follows from the
    layout, which rows a step reads does not.

    Args:
        store: the tokens.
        plan: sizes and seed.
        end_token: fills unpacked rows.

    Raises:
        UsageError: less text than one row.
    """

    def __init__(self, store: TokenStore, plan: Plan, *, end_token: int) -> None:
        length = plan.train.sequence_length
        self._rows: Rows = (
            PackedRows(store, length) if plan.train.pack else DocumentRows(store, length, end_token)
        )
        if len(self._rows) == 0:
            raise UsageError(
                f"the data has {len(store.tokens)} tokens, fewer than one sequence of {length} + 1",
                hint="give more data, or a shorter train.sequence_length",
            )
        self._seed = plan.train.seed
        self.shape: BatchShape = batch_shape(plan)
        self._order = lru_cache(maxsize=2)(self._permutation)

    def microbatches(self, step: int, data_index: int) -> list[Batch]:
        """The micro-batches of one rank, in order.

        Args:
            step: from 1.
            data_index: which of the data ranks, from 0.
        """
        first = (step - 1) * self.shape.sequences_per_step
        first += data_index * self.shape.sequences_per_rank
        size = self.shape.microbatch_sequences
        return [
            self._batch(range(first + i * size, first + (i + 1) * size))
            for i in range(self.shape.num_microbatches)
        ]

    def _batch(self, places: range) -> Batch:
        rows = [self._rows[self._row_at(place)] for place in places]
        stacked = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return Batch(*stacked)

    def _row_at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._rows))
        return int(self._order(epoch)[index])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return rng.permutation(len(self._rows), seed=self._seed, purpose="shuffle", stream=epoch)
