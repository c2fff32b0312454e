"""The executor of one process: a whole model, the step's tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.decode.paged import PagedStore, extend_all
from paceline.decode.sampler import Sampled, sample_rows
from paceline.models.decoder import Decoder
from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.tables import Tables


class LocalExecutor:
    """Computes on the device that the model is on, in the model's dtype.

    Args:
        model: with its weights.
        num_blocks: blocks for keys and values.
        block_size: tokens to a block.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        self._model = model.eval()
        self.num_blocks, self.block_size = num_blocks, block_size
        weight = model.embedding.weight
        self._store = PagedStore(model.spec, num_blocks, block_size, weight.dtype, weight.device)
        self._tables = Tables(block_size, model.num_virtual_tokens)

    def run(self, step: Sequence[Work]) -> StepResult:
        sampled: dict[int, Sampled] = {}
        for works in self._passes(step):
            sampled |= self._compute(works)
        return StepResult(sampled)

    def release(self, request_id: int) -> None:
        self._tables.release(request_id)

    def restart(self) -> None:
        self._tables.clear()

    def close(self) -> None:
        pass

    def _passes(self, step: Sequence[Work]) -> list[list[Work]]:
        """What is computed together; a prelude stands before one sequence alone."""
        if self._model.num_virtual_tokens == 0:
            return [list(step)] if step else []
        begun = [work for work in step if work.start > 0]
        return [*([begun] if begun else []), *([work] for work in step if work.start == 0)]

    @torch.inference_mode()
    def _compute(self, works: Sequence[Work]) -> dict[int, Sampled]:
        sequences = [self._tables.extend(work) for work in works]
        ends = torch.tensor([len(work.tokens) for work in works]).cumsum(0).tolist()
        drawn = [(work, end - 1) for work, end in zip(works, ends, strict=True) if work.draw]
        logits_RV = extend_all(self._model, sequences, self._store, [place for _, place in drawn])
        found = sample_rows(logits_RV, [work.draw for work, _ in drawn if work.draw])
        return {work.request_id: one for (work, _), one in zip(drawn, found, strict=True)}
