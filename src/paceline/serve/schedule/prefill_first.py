"""Whole prompts before any answer goes on: a step is prompts or decodes, not both.

Source: Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, arXiv:2309.06180, Sec. 4.5; so vLLM's first scheduler orders its steps.
Replaces: serial.  Needs: nothing.  Forbids: nothing.
Cost: every answer waits while prompts are computed, and longer the longer they are.
Differs: a prompt that is longer than a step's budget takes several steps, one after the other;
    who loses its blocks is computed again, and never swapped.
"""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, StepPlan, View
from paceline.serve.schedule.room import Room


def prefill_first(view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """Prompts while there are some that find room, else all answers' next tokens."""
    room = Room(view, budget)
    for request in view.running:
        if not request.is_decoding or request.num_left > 1:
            room.go_on(request)
    room.admit_all(whole=True)
    if room.is_empty:
        for request in view.running:
            room.go_on(request)
    return room.plan()
