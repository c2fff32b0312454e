"""From a step's logits to what it gave: tokens that are chosen, and known ones that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from paceline.decode.logprobs import Sampled, with_logprobs
from paceline.decode.sampler import Refused, Sampler
from paceline.serve.executor.base import StepResult, Work


def rows_wanted(works: Sequence[Work]) -> list[int]:
    """The tokens whose logits `chosen` needs, by their place among all tokens of the works.

    First those after which a token is drawn, then those whose next one is scored.
    """
    ends = list(accumulate(len(work.tokens) for work in works))
    drawn = [end - 1 for work, end in zip(works, ends, strict=True) if work.draw]
    scored = [
        end - len(work.tokens) + index
        for work, end in zip(works, ends, strict=True)
        for index in range(len(work.scored))
    ]
    return [*drawn, *scored]


def chosen(logits_RV: Tensor, works: Sequence[Work], sampler: Sampler) -> StepResult:
    """What works gave; those that could not be answered are told apart.

    Args:
        logits_RV: of the rows that are wanted.
        works: computed in one pass.
        sampler: of their requests.
    """
    draws = {work.request_id: work.draw for work in works if work.draw}
    found = sampler.sample(logits_RV[: len(draws)], draws)
    sampled = {number: one for number, one in found.items() if isinstance(one, Sampled)}
    failed = {number: one.why for number, one in found.items() if isinstance(one, Refused)}
    return StepResult(sampled, failed, _scores(logits_RV[len(draws) :], works))


def _scores(logits_RV: Tensor, works: Sequence[Work]) -> dict[int, Sequence[Sampled]]:
    """The log-probabilities that works want of tokens that are known."""
    scores: dict[int, Sequence[Sampled]] = {}
    start = 0
    for work in works:
        if work.scored:
            rows_RV = logits_RV[start : start + len(work.scored)]
            scores[work.request_id] = with_logprobs(rows_RV, work.scored, work.num_top)
            start += len(work.scored)
    return scores
