"""The executor of one process: a whole model, the step's tokens in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.decode.grammar import Grammars
from paceline.decode.paged import PagedStore, extend_all
from paceline.decode.sampler import Sampler
from paceline.models.decoder import Decoder
from paceline.models.peft.segments import Segments
from paceline.serve.executor.base import OneAtATime, StepResult, Work
from paceline.serve.executor.chosen import chosen, rows_wanted
from paceline.serve.executor.tables import Tables


class LocalExecutor(OneAtATime):
    """Computes on the device that the model is on, in the model's dtype.

    Args:
        model: with its weights.
        num_blocks: blocks for keys and values.
        block_size: tokens to a block.
        grammars: of the model's answers; None where no request has one.
        segments: that the model's adapters look at, if it has some beside it.
    """

    def __init__(
        self,
        model: Decoder,
        num_blocks: int,
        block_size: int,
        grammars: Grammars | None = None,
        segments: Segments | None = None,
    ) -> None:
        super().__init__()
        self._model, self._segments = model.eval(), segments
        self.num_blocks, self.block_size = num_blocks, block_size
        weight = model.embedding.weight
        self._store = PagedStore(model.spec, num_blocks, block_size, weight.dtype, weight.device)
        self._tables = Tables(block_size, model.num_virtual_tokens)
        self._sampler = Sampler(grammars)

    def run(self, step: Sequence[Work]) -> StepResult:
        result = StepResult({})
        for works in self._passes(step):
            result |= self._compute(works)
        return result

    def release(self, request_id: int) -> None:
        self._tables.release(request_id)
        self._sampler.forget(request_id)

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
    def _compute(self, works: Sequence[Work]) -> StepResult:
        if self._segments is not None:
            lengths = [len(work.tokens) for work in works]
            self._segments.set([work.adapter for work in works], lengths)
        sequences = [self._tables.extend(work) for work in works]
        logits_RV = extend_all(self._model, sequences, self._store, rows_wanted(works))
        return chosen(logits_RV, works, self._sampler)
