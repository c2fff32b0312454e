"""The executor of one process: a whole model, the step's tokens in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from paceline.decode.grammar import Grammars
from paceline.decode.logprobs import with_logprobs
from paceline.decode.paged import PagedStore, extend_all
from paceline.decode.sampler import Refused, Sampled, Sampler
from paceline.models.decoder import Decoder
from paceline.models.peft.segments import Segments
from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.tables import Tables


class LocalExecutor:
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
        self._model, self._segments = model.eval(), segments
        self.num_blocks, self.block_size = num_blocks, block_size
        weight = model.embedding.weight
        self._store = PagedStore(model.spec, num_blocks, block_size, weight.dtype, weight.device)
        self._tables = Tables(block_size, model.num_virtual_tokens)
        self._sampler = Sampler(grammars)

    def run(self, step: Sequence[Work]) -> StepResult:
        found: dict[int, Sampled | Refused] = {}
        scored: dict[int, Sequence[Sampled]] = {}
        for works in self._passes(step):
            of_pass, scored_of_pass = self._compute(works)
            found |= of_pass
            scored |= scored_of_pass
        return step_result(found, scored)

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
    def _compute(
        self, works: Sequence[Work]
    ) -> tuple[dict[int, Sampled | Refused], dict[int, Sequence[Sampled]]]:
        """What is drawn, and the prompts' tokens that are scored."""
        if self._segments is not None:
            lengths = [len(work.tokens) for work in works]
            self._segments.set([work.adapter for work in works], lengths)
        sequences = [self._tables.extend(work) for work in works]
        ends = torch.tensor([len(work.tokens) for work in works]).cumsum(0).tolist()
        drawn = [end - 1 for work, end in zip(works, ends, strict=True) if work.draw]
        scored = [
            end - len(work.tokens) + index
            for work, end in zip(works, ends, strict=True)
            for index in range(len(work.scored))
        ]
        logits_RV = extend_all(self._model, sequences, self._store, [*drawn, *scored])
        draws = {work.request_id: work.draw for work in works if work.draw}
        found = self._sampler.sample(logits_RV[: len(drawn)], draws)
        return found, score(logits_RV[len(drawn) :], works)


def score(logits_RV: Tensor, works: Sequence[Work]) -> dict[int, Sequence[Sampled]]:
    """The log-probabilities that works want of tokens that are known.

    Args:
        logits_RV: one row for each `Work.scored`, in order.
        works: of the pass.
    """
    scored: dict[int, Sequence[Sampled]] = {}
    start = 0
    for work in works:
        if work.scored:
            rows_RV = logits_RV[start : start + len(work.scored)]
            scored[work.request_id] = with_logprobs(rows_RV, work.scored, work.num_top)
            start += len(work.scored)
    return scored


def step_result(
    found: Mapping[int, Sampled | Refused], scored: Mapping[int, Sequence[Sampled]]
) -> StepResult:
    """What a step gave, those that could not be answered apart."""
    sampled = {number: one for number, one in found.items() if isinstance(one, Sampled)}
    failed = {number: one.why for number, one in found.items() if isinstance(one, Refused)}
    return StepResult(sampled, failed, scored)
