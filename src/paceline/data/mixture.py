"""Which source each row of a mixture comes from: a pure function of (seed, place).

Weights are shares of rows. Places are cut into blocks of one size, in each of which every source
has exactly its share (rounded by the largest remainder), in an order of the block's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from paceline.core import rng
from paceline.core.errors import UsageError

MAX_BLOCK = 1000
_EXACT = 1e-9


def block_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in a block: the smallest in which all shares are whole, or `MAX_BLOCK`.

    Raises:
        UsageError: a source would have no row in a block.
    """
    shares = np.array(weights) / sum(weights)
    size = next((n for n in range(1, MAX_BLOCK) if _are_whole(shares * n)), MAX_BLOCK)
    counts = np.floor(shares * size + _EXACT).astype(int)
    remainders = shares * size - counts
    for source in np.argsort(-remainders, kind="stable")[: size - int(counts.sum())]:
        counts[source] += 1
    if (counts == 0).any():
        smallest = min(weights)
        raise UsageError(
            f"the weight {smallest:g} is less than a share of 1 in {MAX_BLOCK} rows",
            hint="a larger weight, or leave that source out",
        )
    return tuple(counts.tolist())


def _are_whole(values: NDArray[np.float64]) -> bool:
    return bool((np.abs(values - values.round()) < _EXACT * len(values)).all())


class MixtureOrder:
    """The source of each place, and how often that source has had its turn before.

    Args:
        weights: of the sources; positive.
        seed: of the order.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self._counts = block_counts(weights)
        self._seed = seed
        self._block = lru_cache(maxsize=2)(self._make_block)

    def at(self, place: int) -> tuple[int, int]:
        """The source of a place from 0, and its turn from 0."""
        block, index = divmod(place, sum(self._counts))
        sources, turns = self._block(block)
        source = int(sources[index])
        return source, block * self._counts[source] + int(turns[index])

    def _make_block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sources of a block's places, and the turns of each within the block."""
        in_order = np.repeat(np.arange(len(self._counts)), self._counts)
        order = rng.permutation(len(in_order), seed=self._seed, purpose="mixture", stream=block)
        sources = in_order[order]
        turns = np.empty_like(sources)
        for source, count in enumerate(self._counts):
            turns[sources == source] = np.arange(count)
        return sources, turns
