"""When each pass runs, if passes cost what is said: bubbles and activations of a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from paceline.parallel.pipeline.base import (
    COMPUTES,
    UNIT_COSTS,
    Action,
    Costs,
    Kind,
    ended_by,
    line_of,
    needs,
)


class Span(NamedTuple):
    """One pass on the clock."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The passes of every rank on one clock that starts at 0; times in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def duration(self) -> float:
        """From the first start to the last end."""
        return max(span.end for own in self.spans for span in own)

    @property
    def bubble(self) -> float:
        """The most that a rank is idle from the first start to the last end of all ranks.

        So GPipe, 1F1B and interleaved schedules count it.
        """
        return max(self.duration - _work(own) for own in self.spans)

    @property
    def inner_bubble(self) -> float:
        """The most that a rank is idle from its own first start to its own last end.

        So the zero-bubble papers count it: a rank whose step ends early begins the next early.
        """
        return max(own[-1].end - own[0].start - _work(own) for own in self.spans)


def timeline(
    actions: Sequence[Iterable[Action]], costs: Costs = UNIT_COSTS, *, transfer: float = 0.0
) -> Timeline:
    """Runs every rank's passes in their order, each as soon as what it needs is there.

    Args:
        actions: what each rank does; transfers among it are left out.
        costs: what passes take.
        transfer: what a tensor takes from one rank to another; ranks work meanwhile.

    Raises:
        ValueError: the ranks wait for each other for ever.
    """
    todo = [[action for action in own if action.kind in COMPUTES] for own in actions]
    line = line_of(todo)
    ends: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in todo]

    def start_of(rank: int, action: Action) -> float | None:
        """The earliest start, None while something that it needs has no time yet."""
        start = spans[rank][-1].end if spans[rank] else 0.0
        for need in needs(action, line):
            if need not in ends:
                return None
            start = max(start, ends[need] + (transfer if line.ranks[need.stage] != rank else 0.0))
        return start

    has_moved = True
    while has_moved:
        has_moved = False
        for rank, own in enumerate(todo):
            while len(spans[rank]) < len(own):
                action = own[len(spans[rank])]
                start = start_of(rank, action)
                if start is None:
                    break
                end = start + costs.of(action.kind)
                ends |= dict.fromkeys(ended_by(action), end)
                spans[rank].append(Span(action, start, end))
                has_moved = True
    stuck = [own[len(done)] for own, done in zip(todo, spans, strict=True) if len(done) < len(own)]
    if stuck:
        raise ValueError(f"ranks wait for each other for ever, at {stuck}")
    return Timeline(tuple(map(tuple, spans)))


def peak_activations(actions: Iterable[Action]) -> int:
    """The most activations that a rank holds at a time, in stages.

    One is held from its forward pass to the end of its backward pass, of its weight pass where
    backward passes are split. Papers count in micro-batches of a whole rank: divide by
    stages_per_rank.
    """
    held = peak = 0
    for action in actions:
        held += {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.BACKWARD_WEIGHT: -1}.get(action.kind, 0)
        peak = max(peak, held)
    return peak


def peak_scores(actions: Iterable[Action]) -> int:
    """The most micro-batches of whose logits a rank holds its share at a time: from S to T."""
    held = peak = 0
    for action in actions:
        if action.kind in (Kind.SCORE, Kind.SCORE_INPUT):
            held += 1
        elif action.kind in (Kind.SCORE_BACKWARD, Kind.SCORE_WEIGHT, Kind.LOSS):
            held -= 1
        peak = max(peak, held)
    return peak


def _work(spans: Iterable[Span]) -> float:
    return sum(span.end - span.start for span in spans)
