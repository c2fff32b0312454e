from __future__ import annotations

from dataclasses import replace

import pytest
from traces import NOW_S, call, group, meetings, trace, way

from paceline.dist.calls import RankTrace
from paceline.resilience.clocks import aligned
from paceline.resilience.verdict import judge

AHEAD_S = 7.0


def ahead(found: RankTrace, by_s: float = AHEAD_S) -> RankTrace:
    """A rank on another machine, whose clock is ahead."""
    calls = (
        c._replace(
            enter_s=c.enter_s + by_s,
            wait_s=(c.wait_s or 0.0) + by_s,
            leave_s=None if c.leave_s is None else c.leave_s + by_s,
        )
        for c in found.calls
    )
    return replace(found, host="there", calls=tuple(calls))


def test_clocks_are_told_by_what_ends_everywhere_at_once():
    traces = meetings([[0.0, 0.02, 0.05, 0.01], [0.1, 0.13, 0.1, 0.1], [0.2, 0.2, 0.2, 0.24]])
    uneven = [*traces[:2], *(ahead(t) for t in traces[2:])]
    for found, true in zip(aligned(uneven), traces, strict=True):
        assert [c.enter_s for c in found.calls] == pytest.approx([c.enter_s for c in true.calls])
        assert [c.leave_s for c in found.calls] == pytest.approx([c.leave_s for c in true.calls])


def test_one_machine_has_one_clock():
    traces = meetings([[0.0, 0.0, 0.5, 0.0]])
    assert aligned(traces) == traces


def test_a_machine_that_nothing_is_known_of_keeps_its_clock():
    alone = ahead(trace(1, call(way(0, 1), 1, 0.0, 1.0)))
    assert aligned([trace(0), alone]) == [trace(0), alone]


def test_a_clock_that_is_ahead_makes_nobody_late_and_hides_nobody():
    clean = [[0.1 * n] * 4 for n in range(12)]
    for extra, expected in (([], None), ([[1.2, 1.2, 1.2, 2.2]], (3,))):
        traces = meetings([*clean, *extra], group(0, 1, 2, 3))
        uneven = [*traces[:2], *(ahead(t) for t in traces[2:])]
        found = judge(uneven, NOW_S, patience=20.0)
        assert (found and found.ranks) == expected
