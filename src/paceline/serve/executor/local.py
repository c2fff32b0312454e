"""The executor of one process: a whole model, the step's tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.decode.paged import Next, PagedStore, extend_all
from paceline.decode.sampler import Sampled, sample_rows
from paceline.models.decoder import Decoder
from paceline.models.peft.segments import Segments
from paceline.serve.executor.base import StepResult, Work


class LocalExecutor:
    """Computes on the device that the model is on, in the model's dtype.

    Args:
        model: with its weights.
        num_blocks: blocks for keys and values.
        block_size: tokens to a block.
        segments: that the model's adapters look at, if it has some beside it.
    """

    def __init__(
        self,
        model: Decoder,
        num_blocks: int,
        block_size: int,
        segments: Segments | None = None,
    ) -> None:
        self._model, self._segments = model.eval(), segments
        self.num_blocks, self.block_size = num_blocks, block_size
        weight = model.embedding.weight
        self._store = PagedStore(model.spec, num_blocks, block_size, weight.dtype, weight.device)
        self._tables: dict[int, list[int]] = {}

    def run(self, step: Sequence[Work]) -> StepResult:
        sampled: dict[int, Sampled] = {}
        for works in self._passes(step):
            sampled |= self._compute(works)
        return StepResult(sampled)

    def release(self, request_id: int) -> None:
        self._tables.pop(request_id, None)

    def restart(self) -> None:
        self._tables.clear()

    def close(self) -> None:
        pass

    def _passes(self, step: Sequence[Work]) -> list[list[Work]]:
        """What is computed together: rows of an adapter lie next to each other.

        A prelude stands before one sequence alone.
        """
        if self._model.num_virtual_tokens == 0:
            return [sorted(step, key=lambda work: work.adapter)] if step else []
        begun = [work for work in step if work.start > 0]
        return [*([begun] if begun else []), *([work] for work in step if work.start == 0)]

    @torch.inference_mode()
    def _compute(self, works: Sequence[Work]) -> dict[int, Sampled]:
        if self._segments is not None:
            lengths = [len(work.tokens) for work in works]
            self._segments.set([work.adapter for work in works], lengths)
        sequences = [self._next(work) for work in works]
        ends = torch.tensor([len(work.tokens) for work in works]).cumsum(0).tolist()
        drawn = [(work, end - 1) for work, end in zip(works, ends, strict=True) if work.draw]
        logits_RV = extend_all(self._model, sequences, self._store, [place for _, place in drawn])
        found = sample_rows(logits_RV, [work.draw for work, _ in drawn if work.draw])
        return {work.request_id: one for (work, _), one in zip(drawn, found, strict=True)}

    def _next(self, work: Work) -> Next:
        table = self._tables.setdefault(work.request_id, [])
        table.extend(work.new_blocks)
        num_virtual = self._model.num_virtual_tokens
        num_before = num_virtual + work.start if work.start else 0
        num_tokens = num_virtual + work.start + len(work.tokens)
        assert len(table) * self.block_size >= num_tokens, "the table and the request disagree"
        return Next(work.tokens, num_before, torch.tensor(table, dtype=torch.int32))
