"""The blocks of every request, as whoever computes knows them from the steps."""

from __future__ import annotations

import torch

from paceline.decode.paged import Next
from paceline.serve.executor.base import Work

_FIRST_SHAPE = (16, 64)


class Tables:
    """Request to table: it grows by what comes with each part of a step.

    All tables are rows of one matrix, which is doubled when it is full, so that a step writes only
    the blocks that are new.

    Args:
        block_size: tokens to a block.
        num_virtual: virtual tokens before every request's own.
    """

    def __init__(self, block_size: int, num_virtual: int = 0) -> None:
        self._block_size, self._num_virtual = block_size, num_virtual
        self.clear()

    def extend(self, work: Work) -> Next:
        """What is to be computed of a request, its new blocks taken up."""
        row, length = self._places.get(work.request_id) or (self._free_row(), 0)
        if work.new_blocks:
            start, length = length, length + len(work.new_blocks)
            self._reserve(row, length)
            self._tables_BM[row, start:length] = torch.tensor(work.new_blocks, dtype=torch.int32)
        self._places[work.request_id] = row, length
        num_before = self._num_virtual + work.start if work.start else 0
        num_tokens = self._num_virtual + work.start + len(work.tokens)
        assert length * self._block_size >= num_tokens, "the table and the request disagree"
        return Next(work.tokens, num_before, self._tables_BM[row, :length])

    def release(self, request_id: int) -> None:
        """Forgets a request, known or not."""
        if request_id in self._places:
            self._free.append(self._places.pop(request_id)[0])

    def clear(self) -> None:
        """Forgets all of them."""
        self._tables_BM = torch.zeros(_FIRST_SHAPE, dtype=torch.int32)
        self._places: dict[int, tuple[int, int]] = {}  # request to row and length
        self._free: list[int] = []

    def _free_row(self) -> int:
        return self._free.pop() if self._free else len(self._places)

    def _reserve(self, row: int, length: int) -> None:
        """Room for so long a table in a row."""
        num_rows, width = self._tables_BM.shape
        while row >= num_rows or length > width:
            num_rows *= 1 + (row >= num_rows)
            width *= 1 + (length > width)
        if (num_rows, width) != self._tables_BM.shape:
            old_BM = self._tables_BM
            self._tables_BM = torch.zeros(num_rows, width, dtype=torch.int32)
            self._tables_BM[: old_BM.shape[0], : old_BM.shape[1]] = old_BM
