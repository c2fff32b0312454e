"""Synthetic traces of runs: ranks that go through the same collectives at given times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from paceline.dist.calls import Call, Channel, RankTrace, StepTimes

WORLD = Channel((), (0, 1, 2, 3))
NOW_S = 1000.0
STEP_S = 0.1


def group(*members: int, axis: str = "dp_shard") -> Channel:
    return Channel((axis,), members)


def way(source: int, destination: int, axis: str = "pp") -> Channel:
    return Channel((axis,), (source, destination), "activations")


def call(
    channel: Channel,
    sequence: int,
    enter_s: float,
    leave_s: float | None,
    *,
    wait_s: float | None = None,
    operation: str = "all-reduce",
    size_bytes: int = 1024,
) -> Call:
    """A call that waits from its beginning unless it says otherwise."""
    return Call(
        operation=operation,
        channel=channel,
        sequence=sequence,
        purpose=channel.purpose or "gradients",
        size_bytes=size_bytes,
        phase="training",
        enter_s=enter_s,
        wait_s=enter_s if wait_s is None else wait_s,
        leave_s=leave_s,
    )


def trace(rank: int, *calls: Call, reached: Mapping[Channel, int] | None = None) -> RankTrace:
    """A rank that is well, after ten steps, in a run that has been going for a second."""
    begun = {c.channel: c.sequence for c in calls} | dict(reached or {})
    ends = [NOW_S - 1 + STEP_S * (index + 1) for index in range(10)]
    steps = tuple(StepTimes(n + 1, end - STEP_S, end, True) for n, end in enumerate(ends))
    return RankTrace(
        rank=rank,
        pid=100 + rank,
        host="here",
        started_s=NOW_S - 60,
        heartbeat_s=NOW_S,
        phase="training",
        phase_s=NOW_S - 50,
        step=10,
        step_s=ends[-1],
        steps=steps,
        reached=begun,
        calls=tuple(calls),
        process="running",
    )


def stopped(found: RankTrace, since_s: float) -> RankTrace:
    return replace(found, process="stopped", heartbeat_s=NOW_S - since_s)


def meetings(
    arrivals: Sequence[Sequence[float]], channel: Channel = WORLD, *, takes_s: float = 1e-3
) -> list[RankTrace]:
    """Ranks that meet again and again, each leaving once the last has come.

    Args:
        arrivals: of each meeting, when each rank comes.
        channel: what they meet in; its members are ranks 0, 1, ...
        takes_s: from the last arrival until they leave.
    """
    calls: list[list[Call]] = [[] for _ in channel.members]
    for sequence, times in enumerate(arrivals, start=1):
        for own, enter_s in zip(calls, times, strict=True):
            own.append(call(channel, sequence, enter_s, max(times) + takes_s))
    return [trace(rank, *own) for rank, own in zip(channel.members, calls, strict=True)]
