"""Batches as a function of (seed, step): there is no state but the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from paceline.core import rng
from paceline.data.batch import Batch
from paceline.data.mixture import MixtureOrder
from paceline.data.rows import Row, as_batch, rows_of
from paceline.data.store import TokenStore
from paceline.data.tokens import Source
from paceline.plan.batch import BatchShape, batch_shape
from paceline.plan.plan import Plan


class Loader:
    """Gives each rank its micro-batches of each step.

    Step s, from 1, reads places ``(s - 1) * n`` to ``s * n - 1`` of an endless sequence of rows;
    which rank reads which of them follows from the layout, which rows a step reads does not.

    An epoch of a source is one reading of all its rows, each once, in an order of the epoch's own.
    Of a mixture each source runs through epochs of its own: the larger its weight and the fewer
    its rows, the sooner it begins anew.

    Args:
        data: the tokens of a source, or several sources with their weights.
        plan: sizes and seed.
        end_token: fills rows that are padded.

    Raises:
        UsageError: less text than one row, a document that is too long, or a weight too small.
    """

    def __init__(self, data: TokenStore | Sequence[Source], plan: Plan, *, end_token: int) -> None:
        sources = [Source("the data", (data,))] if isinstance(data, TokenStore) else data
        self._rows = [rows_of(source, plan.train, pad_token=end_token) for source in sources]
        self._mixture = MixtureOrder([source.weight for source in sources], plan.train.seed)
        self._seed = plan.train.seed
        self.shape: BatchShape = batch_shape(plan)
        self._order = lru_cache(maxsize=2 * len(sources))(self._permutation)

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
            as_batch([self._row_at(place) for place in range(start, start + size)])
            for start in range(first, first + self.shape.sequences_per_rank, size)
        ]

    def _row_at(self, place: int) -> Row:
        source, turn = self._mixture.at(place)
        rows = self._rows[source]
        epoch, index = divmod(turn, len(rows))
        return rows[int(self._order(source, epoch)[index])]

    def _permutation(self, source: int, epoch: int) -> NDArray[np.int64]:
        stream = (source << 32) + epoch
        count = len(self._rows[source])
        return rng.permutation(count, seed=self._seed, purpose="shuffle", stream=stream)
