"""One request at a time, in order of arrival, its prompt in chunks of the token budget.

Source: none; the baseline that batching policies are measured against.
Replaces: nothing, it is the default.  Needs: nothing.  Forbids: nothing.
Cost: a request waits for all before it; weights are read once for each request's token.
Differs: no paper to differ from.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.serve.schedule.base import Budget, RequestView, Share, StepPlan


def serial(view: Sequence[RequestView], budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """The first request's next tokens."""
    if not view:
        return StepPlan(())
    first = view[0]
    num_tokens = min(first.num_total - first.num_computed, budget.max_batch_tokens)
    return StepPlan((Share(first.id, num_tokens),))
