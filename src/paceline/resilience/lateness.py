"""Which rank others wait for, and how long: from the times of finished collectives.

A wait is charged to the rank that came last, but for the time in which that rank waited itself: the
charge goes on to whom it waited for, so that a late rank far up a pipeline is the one named.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paceline.dist.calls import Call, Channel, RankTrace

STALL_STEPS = 5.0
"""A single stall is told where it is longer than so many median steps."""
STALL_S = 0.1
"""And than this: schedulers of busy machines take longer than a millisecond."""
AGAIN_SHARE = 0.5
"""A rank is late again and again where others wait for it half the time of their steps."""
AGAIN = 3.0
"""And so many times as long as for any other."""
AGAIN_STEPS = 8
"""In at least so many steps."""

Interval = tuple[float, float]


class Late(NamedTuple):
    """A rank that is late.

    Attributes:
        rank: which.
        evidence: the figures, in words.
    """

    rank: int
    evidence: str


def late_rank(traces: Sequence[RankTrace], step_s: float, patience: float) -> Late | None:
    """The rank that has held up the others for longest, if that is more than usual.

    Args:
        traces: of all ranks, with finished calls.
        step_s: median time of a step.
        patience: deviations that are nothing special.
    """
    return _stalled(traces, step_s, patience) or _late_again(traces, step_s)


def _stalled(traces: Sequence[RankTrace], step_s: float, patience: float) -> Late | None:
    """The rank of the longest stall, where it is too long for chance."""
    stalls = charged(traces)
    longest = [(e - b, rank) for rank, found in stalls.items() for b, e in found]
    if not longest:
        return None
    longest_s, rank = max(longest)
    others = [length_s for length_s, other in longest if other != rank] or [0.0]
    middle = statistics.median(others)
    spread = 1.4826 * statistics.median(abs(length_s - middle) for length_s in others)
    limit_s = max(STALL_S, STALL_STEPS * step_s, middle + patience * spread)
    if longest_s <= limit_s:
        return None
    count = sum(end - begin > limit_s for begin, end in stalls[rank])
    return Late(
        rank,
        f"rank {rank} came {longest_s:.3f} s after those that waited for it, "
        f"{longest_s / step_s:.1f} median steps; so late or later {count} time(s); "
        f"the others' median is {middle:.4f} s",
    )


def _late_again(traces: Sequence[RankTrace], step_s: float) -> Late | None:
    """The rank that is slower than those with the same work, step after step.

    Pipeline stages are left out: some have more to do than others.
    """
    stamps = [call.enter_s for trace in traces for call in trace.calls]
    if not stamps or (span_s := max(stamps) - min(stamps)) < AGAIN_STEPS * step_s:
        return None
    found = charged(traces, among_equals=True)
    totals = {trace.rank: 0.0 for trace in traces}
    totals |= {rank: sum(end - begin for begin, end in times) for rank, times in found.items()}
    *_, second, (held_s, rank) = sorted((total, rank) for rank, total in totals.items())
    if held_s < AGAIN_SHARE * span_s or held_s < AGAIN * second[0]:
        return None
    return Late(
        rank,
        f"others have waited for rank {rank} in {held_s / span_s:.0%} of the last {span_s:.1f} s, "
        f"and for no other in more than {second[0] / span_s:.0%}",
    )


def charged(
    traces: Sequence[RankTrace], *, among_equals: bool = False
) -> dict[int, list[Interval]]:
    """For each rank the times in which others waited for it while it waited for nobody.

    Args:
        traces: of all ranks, with finished calls.
        among_equals: in collectives of ranks with the same work alone.
    """
    waits = {trace.rank: _own_waits(trace.calls) for trace in traces}
    blamed: defaultdict[int, list[Interval]] = defaultdict(list)
    for (channel, _), calls in _together(traces).items():
        if among_equals and (channel.is_way or "pp" in channel.axes or not channel.axes):
            continue
        last = max(calls, key=lambda rank: calls[rank].enter_s)
        begun_s = calls[last].enter_s
        for rank, call in calls.items():
            if rank != last and call.wait_s is not None and call.wait_s < begun_s:
                blamed[last].append((call.wait_s, begun_s))
    return {rank: _without(_merged(found), waits[rank]) for rank, found in blamed.items()}


def _together(traces: Sequence[RankTrace]) -> dict[tuple[Channel, int], dict[int, Call]]:
    """The calls that belong together, by rank; only those of which no member's is missing.

    While a rank starts, saves or evaluates, others may wait for it for as long as that takes.
    """
    found: defaultdict[tuple[Channel, int], dict[int, Call]] = defaultdict(dict)
    for trace in traces:
        for call in trace.calls:
            if call.phase == "training":
                found[call.channel, call.sequence][trace.rank] = call
    return {
        key: calls
        for key, calls in found.items()
        if len(calls) == len(key[0].members) and len(calls) > 1
    }


def _own_waits(calls: Iterable[Call]) -> list[Interval]:
    waited = [(c.wait_s, c.leave_s) for c in calls if c.wait_s is not None]
    return _merged([(begin, end if end is not None else float("inf")) for begin, end in waited])


def _merged(intervals: list[Interval]) -> list[Interval]:
    """The same times in intervals that do not meet, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _without(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """What of some intervals is in none of others; both in order and apart."""
    left: list[Interval] = []
    at = 0
    for begin, end in intervals:
        while at < len(others) and others[at][1] <= begin:
            at += 1
        index = at
        while index < len(others) and others[index][0] < end:
            if others[index][0] > begin:
                left.append((begin, others[index][0]))
            begin = max(begin, others[index][1])
            index += 1
        if begin < end:
            left.append((begin, end))
    return left
