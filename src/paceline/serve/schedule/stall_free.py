"""Decodes first, then prompts in chunks, under one budget of tokens.

Source: Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve,
    arXiv:2403.02310, Algorithm 3 (stall-free batching) and Sec. 4.1 (chunked prefills).
Replaces: serial, prefill-first.  Needs: nothing.  Forbids: nothing.
Cost: every step that prompts share reads the keys of their earlier chunks once more.
Differs: when blocks are short, the request that was admitted last is preempted and computed again.
"""

from __future__ import annotations

from paceline.serve.schedule.base import Budget, StepPlan, View
from paceline.serve.schedule.room import Room


def stall_free(view: View, budget: Budget, now_s: float) -> StepPlan:  # noqa: ARG001
    """No answer waits for a prompt: what decodes leave of the budget goes to prompts."""
    room = Room(view, budget)
    room.go_on_all()
    room.admit_all()
    return room.plan()
