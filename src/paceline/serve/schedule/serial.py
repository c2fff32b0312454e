"""One request at a time, in order of arrival, its prompt in chunks of the token budget.

Source: none; the baseline that batching policies are measured against.
Replaces: nothing.  Needs: nothing.  Forbids: nothing.
Cost: a request waits for all before it; weights are read once for each request's token.
Differs: no paper to differ from.
"""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, StepPlan, View
from paceline.serve.schedule.room import Room


def serial(view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """The first request's next tokens."""
    room = Room(view, budget)
    for request in view.running:
        room.go_on(request)
    if not view.running:
        for request in view.waiting[:1]:
            room.admit(request)
    return room.plan()
