"""Draws as they go between processes: of a request's first all, of the others what is new.

How a request's tokens are chosen stays the same for all of its answer, and its history only grows.
So after the first draw no more goes over than a position and the tokens that have come since.
"""

from __future__ import annotations

from dataclasses import replace

from paceline.decode.sampler import Draw, SamplingParams
from paceline.serve.executor.base import Work

_AS_BEFORE = SamplingParams()


class DrawTeller:
    """The end that knows all; what it makes of draws goes to a `DrawListener`, in order."""

    def __init__(self) -> None:
        self._told: dict[int, tuple[Draw, int]] = {}  # the first draw; how much of the history

    def new_of(self, work: Work) -> Work:
        """The same work, its draw without what the other end knows."""
        draw = work.draw
        if draw is None:
            return work
        first, num_told = self._told.get(work.request_id, (None, 0))
        new = tuple(draw.history[num_told:])
        self._told[work.request_id] = (first or draw, len(draw.history))
        if first is None:
            return replace(work, draw=replace(draw, history=new))
        same = first.params == draw.params and first.grammar == draw.grammar
        assert same, f"request {work.request_id} has changed how it is sampled"
        return replace(work, draw=Draw(_AS_BEFORE, draw.position, new))

    def forget(self, request_id: int) -> None:
        """Of a request whose next draw is told whole, known or not."""
        self._told.pop(request_id, None)


class DrawListener:
    """The end that chooses; forgets a request where the teller does."""

    def __init__(self) -> None:
        self._heard: dict[int, tuple[Draw, list[int]]] = {}  # the first draw; the history

    def whole(self, work: Work) -> Work:
        """The work as the teller has been given it."""
        draw = work.draw
        if draw is None:
            return work
        first, history = self._heard.setdefault(work.request_id, (draw, []))
        history.extend(draw.history)
        assert len(history) in (0, draw.position), "a part of the history is missing"
        return replace(work, draw=replace(first, position=draw.position, history=history))

    def forget(self, request_id: int) -> None:
        """Of a request that has ended or begins anew, known or not."""
        self._heard.pop(request_id, None)
