"""A batch is admitted when none runs, and runs to the end of its longest answer.

Source: NVIDIA, FasterTransformer (2021), whose batches are fixed when they begin; the baseline of
    Yao et al., Flover, arXiv:2305.13484, and of Yu et al., Orca, OSDI 2022.
Replaces: serial.  Needs: nothing.  Forbids: nothing.
Cost: who comes late waits for the longest answer before it; ended answers leave seats empty.
Differs: answers that have ended are not computed on as padding; a batch whose prompts exceed a
    step's budget is gathered over several steps, all of them before its second tokens.
"""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, StepPlan, View
from paceline.serve.schedule.room import Room


def static(view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """The batch's prompts, then the next token of each of its answers."""
    room = Room(view, budget, to_end=True)
    for request in view.running:
        if not request.is_decoding:
            room.go_on(request)
    is_gathering = all(request.num_total <= request.num_prompt + 1 for request in view.running)
    for request in view.waiting if is_gathering and not room.is_closed else ():
        if not room.admit(request):
            break
    if room.is_empty:
        for request in view.running:
            room.go_on(request)
    return room.plan()
