"""Whose rows are which in a pass over sequences that are computed with different adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHORT_ROWS = 16
"""Rows of an adapter up to which its products are computed together with those of others."""


class Segment(NamedTuple):
    """Rows of a pass that are computed with one adapter.

    Attributes:
        adapter: its name.
        rows: where they are among all.
    """

    adapter: str
    rows: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class Block:
    """Short segments as one batch: equally many rows for each adapter, some of them idle.

    Attributes:
        depth: rows for each adapter.
        sources: the row of the pass in each place of the batch; any in one that is idle.
        rows: those of the pass that are in the batch.
        places: where each of them is in it.
    """

    depth: int
    sources: Tensor
    rows: Tensor
    places: Tensor


class Share(NamedTuple):
    """How the rows of some adapters are computed in a pass.

    Attributes:
        alone: segments that have products of their own, by the adapter's index.
        block: the others.
    """

    alone: tuple[tuple[int, slice], ...]
    block: Block | None


class Segments:
    """What all adapted layers look at: the segments of the pass that is being computed.

    Args:
        device: of the model.

    Attributes:
        num_rows: of the pass.
        adapted: the rows that have an adapter.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_rows = 0
        self.adapted: tuple[Segment, ...] = ()
        self._device = device
        self._shares: dict[tuple[str, ...], Share] = {}

    def set(self, adapters: Sequence[str], lengths: Sequence[int]) -> None:
        """Says what the next pass consists of.

        Args:
            adapters: of each sequence, in the order of the pass; empty for none. Those of one
                adapter follow each other.
            lengths: rows of each sequence.
        """
        self._shares.clear()
        found: dict[str, slice] = {}
        start = 0
        for adapter, length in zip(adapters, lengths, strict=True):
            before = found.get(adapter, slice(start, start))
            assert before.stop == start, f"rows of {adapter} do not follow each other"
            found[adapter] = slice(before.start, start + length)
            start += length
        found.pop("", None)
        self.num_rows = start
        self.adapted = tuple(Segment(adapter, rows) for adapter, rows in found.items())

    def share(self, names: tuple[str, ...]) -> Share:
        """How the rows of some adapters are computed; one answer a pass for all layers."""
        if names not in self._shares:
            self._shares[names] = self._share(names)
        return self._shares[names]

    def _share(self, names: tuple[str, ...]) -> Share:
        indices = {name: index for index, name in enumerate(names)}
        mine = [segment for segment in self.adapted if segment.adapter in indices]
        short = [segment for segment in mine if segment.num_rows <= SHORT_ROWS]
        if 2 * len(short) < len(names):  # most of the batch would be idle
            short = []
        alone = [(indices[one.adapter], one.rows) for one in mine if one not in short]
        block = self._block([(indices[one.adapter], one.rows) for one in short], len(names))
        return Share(tuple(alone), block if short else None)

    def _block(self, short: Sequence[tuple[int, slice]], num_adapters: int) -> Block:
        depth = max((rows.stop - rows.start for _, rows in short), default=0)
        sources = [0] * (num_adapters * depth)
        places: list[int] = []
        for index, rows in short:
            first, count = index * depth, rows.stop - rows.start
            sources[first : first + count] = range(rows.start, rows.stop)
            places.extend(range(first, first + count))
        return Block(
            depth,
            self._tensor(sources),
            self._tensor([row for _, rows in short for row in range(rows.start, rows.stop)]),
            self._tensor(places),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, device=self._device)
