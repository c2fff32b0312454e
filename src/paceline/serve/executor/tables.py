"""The blocks of every request, as whoever computes knows them from the steps."""

from __future__ import annotations

import torch

from paceline.decode.paged import Next
from paceline.serve.executor.base import Work


class Tables:
    """Request to table: it grows by what comes with each part of a step.

    Args:
        block_size: tokens to a block.
        num_virtual: virtual tokens before every request's own.
    """

    def __init__(self, block_size: int, num_virtual: int = 0) -> None:
        self._block_size, self._num_virtual = block_size, num_virtual
        self._tables: dict[int, list[int]] = {}

    def extend(self, work: Work) -> Next:
        """What is to be computed of a request, its new blocks taken up."""
        table = self._tables.setdefault(work.request_id, [])
        table.extend(work.new_blocks)
        num_before = self._num_virtual + work.start if work.start else 0
        num_tokens = self._num_virtual + work.start + len(work.tokens)
        assert len(table) * self._block_size >= num_tokens, "the table and the request disagree"
        return Next(work.tokens, num_before, torch.tensor(table, dtype=torch.int32))

    def release(self, request_id: int) -> None:
        """Forgets a request, known or not."""
        self._tables.pop(request_id, None)

    def clear(self) -> None:
        """Forgets all of them."""
        self._tables.clear()
