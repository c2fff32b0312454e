"""What a rank leaves of its collectives, as plain data: who called what, when, and who has not yet.

Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Phase = Literal["starting", "training", "saving", "evaluating"]
"""What a rank is at. Steps have a usual length, and nothing else has."""

State = Literal["running", "done", "failed", "lost"]
"""``failed``: an error of its own has ended the rank; ``lost``: another rank's end has."""

Process = Literal["running", "stopped", "gone", "unknown"]
"""What the operating system says; ``unknown`` of a rank on another machine."""

PHASES: tuple[Phase, ...] = ("starting", "training", "saving", "evaluating")
STATES: tuple[State, ...] = ("running", "done", "failed", "lost")
OPERATIONS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "send",
    "receive",
    "collect",
    "barrier",
)


class Channel(NamedTuple):
    """Ranks whose calls go by one count: the members of a group, or the two ends of a way.

    Attributes:
        axes: of the mesh, along which the ranks lie; none: all ranks.
        members: the ranks; of a way its source, then its destination.
        purpose: of what goes that way; of a group nothing, for its calls are one sequence.
    """

    axes: tuple[str, ...]
    members: tuple[int, ...]
    purpose: str = ""

    @property
    def is_way(self) -> bool:
        """Whether it goes from one rank to another, and not among a group."""
        return bool(self.purpose)

    def __str__(self) -> str:
        where = ",".join(self.axes) or "world"
        if not self.is_way:
            return where
        source, destination = self.members
        return f"{where} {source}->{destination} {self.purpose}"


class Call(NamedTuple):
    """One collective, send or receive, as one rank saw it.

    Attributes:
        operation: one of `OPERATIONS`.
        channel: what its sequence counts in.
        sequence: from 1; the same at all members.
        purpose: what for.
        size_bytes: as cost models count them.
        phase: what the rank was at.
        enter_s: when it was begun.
        wait_s: when the rank began to wait for its end; None before.
        leave_s: when the rank went on; None before.
    """

    operation: str
    channel: Channel
    sequence: int
    purpose: str
    size_bytes: int
    phase: Phase
    enter_s: float
    wait_s: float | None
    leave_s: float | None


class StepTimes(NamedTuple):
    """A finished step.

    Attributes:
        step: from 1.
        begin_s: when the one before it had ended, or the rank had begun to train.
        end_s: when it had ended.
        is_plain: whether the rank only trained between these times, and neither saved nor else.
    """

    step: int
    begin_s: float
    end_s: float
    is_plain: bool


@dataclass(frozen=True, slots=True)
class RankTrace:
    """All that is known of one rank at a moment.

    Attributes:
        rank: which.
        pid: of its process.
        host: where that runs.
        started_s: when.
        heartbeat_s: the last sign of life.
        phase: what it is at.
        phase_s: since when.
        state: whether it has ended, and how, as it says itself.
        step: the last one finished; 0 before the first.
        step_s: when that was.
        last_call_s: when it last began a call; 0 before the first.
        steps: the last ones.
        reached: the last sequence that it has begun of each channel.
        calls: oldest first: the open ones, and maybe finished ones.
        process: whether it is there.
    """

    rank: int
    pid: int
    host: str
    started_s: float
    heartbeat_s: float
    phase: Phase
    phase_s: float
    state: State = "running"
    step: int = 0
    step_s: float = 0.0
    last_call_s: float = 0.0
    steps: tuple[StepTimes, ...] = ()
    reached: Mapping[Channel, int] = field(default_factory=dict[Channel, int])
    calls: tuple[Call, ...] = ()
    process: Process = "unknown"
