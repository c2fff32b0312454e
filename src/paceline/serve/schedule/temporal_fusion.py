"""Every request that comes joins the others at their next token.

Source: Yao et al., Flover: A Temporal Fusion Framework for Efficient Autoregressive Model Parallel
    Inference, arXiv:2305.13484.
Replaces: static.  Needs: nothing.  Forbids: nothing.
Cost: a step that a prompt joins lasts as long as the prompt; room is kept for the longest answer.
Differs: what ends leaves blocks, which are taken again where they lie, so that no buffers are moved
    together; a prompt is computed in the step that it joins, not on a stream beside it.
"""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, StepPlan, View
from paceline.serve.schedule.room import Room


def temporal_fusion(view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """One token of every answer, and whole prompts beside them, as memory admits."""
    room = Room(view, budget, to_end=True)
    room.go_on_all()
    room.admit_all(whole=True)
    return room.plan()
