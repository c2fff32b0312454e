"""Which places of a row each rank has. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

AXIS = "cp"


@dataclass(frozen=True, slots=True)
class Placement:
    """How rows are cut over the ranks of the `cp` axis.

    A row is cut into parts, which go round a ring or stay. Neighbouring ranks may share a part.
    Rows are as long as `unit` demands: every rank has equally many places.

    Attributes:
        num_parts: of a row.
        ranks_per_part: ranks that have an equal share of each part, in order.
        is_zigzag: whether part r is chunks r and 2 num_parts - 1 - r of twice as many chunks as
            there are parts, so that under a causal mask all parts have the same work; else parts
            follow each other.
    """

    num_parts: int
    ranks_per_part: int = 1
    is_zigzag: bool = False

    @property
    def num_ranks(self) -> int:
        return self.num_parts * self.ranks_per_part

    @property
    def unit(self) -> int:
        """What the length of a row must be a multiple of."""
        return math.lcm(self.num_parts * (2 if self.is_zigzag else 1), self.num_ranks)

    def padded(self, length: int) -> int:
        """The least length that is not below one and goes."""
        return -(-length // self.unit) * self.unit

    def part(self, index: int, length: int) -> tuple[range, ...]:
        """The chunks of a part, of a row of some length."""
        if not self.is_zigzag:
            return (_chunk(index, self.num_parts, length),)
        num_chunks = 2 * self.num_parts
        chunks = index, num_chunks - 1 - index
        return tuple(_chunk(chunk, num_chunks, length) for chunk in chunks)

    def places(self, rank: int, length: int) -> tuple[range, ...]:
        """The places that a rank has, in order."""
        index, share = divmod(rank, self.ranks_per_part)
        return tuple(_cut(self.part(index, length), share, length // self.num_ranks))


def _chunk(index: int, num_chunks: int, length: int) -> range:
    size = length // num_chunks
    return range(index * size, (index + 1) * size)


def _cut(chunks: Sequence[range], share: int, size: int) -> Iterator[range]:
    """The share-th `size` places of chunks laid end to end."""
    before = 0
    for chunk in chunks:
        first, last = share * size - before, (share + 1) * size - before
        if found := chunk[max(0, first) : max(0, last)]:
            yield found
        before += len(chunk)
