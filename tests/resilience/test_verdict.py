from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import NOW_S, STEP_S, WORLD, call, group, meetings, stopped, trace, way

from paceline.dist.calls import Channel, RankTrace, StepTimes
from paceline.resilience.verdict import (
    FLOOR_S,
    LATE_FLOOR_S,
    PHASE_S,
    Verdict,
    judge,
    timeouts_of,
)

PATIENCE = 20.0
LONG_S = 20.0


def verdict(*traces: RankTrace, now_s: float = NOW_S) -> Verdict | None:
    return judge(traces, now_s, patience=PATIENCE)


def waits(rank: int, channel: Channel, sequence: int, *, for_s: float = LONG_S) -> RankTrace:
    return trace(rank, call(channel, sequence, NOW_S - for_s, None))


def left(rank: int, channel: Channel, sequence: int) -> RankTrace:
    return trace(rank, call(channel, sequence, NOW_S - LONG_S - 2, NOW_S - LONG_S - 1))


# Time-outs


def test_timeouts_follow_from_the_steps():
    found = timeouts_of([trace(0)], PATIENCE)
    assert found.step_s == pytest.approx(STEP_S)
    assert found.hang_s == FLOOR_S  # steps of a tenth of a second, all alike
    assert found.late_s == LATE_FLOOR_S
    assert found.phase_s == PHASE_S


def test_timeouts_grow_with_the_steps_and_with_their_spread():
    def run(*times_s: float) -> RankTrace:
        return replace(trace(0), steps=tuple(StepTimes(1, 0.0, t, True) for t in times_s))

    assert timeouts_of([run(1, 1, 1)], PATIENCE).hang_s == 10
    spread = timeouts_of([run(8, 9, 10, 11, 12)], PATIENCE)
    assert spread.hang_s == 100  # 10 medians; 20 deviations of 1.4826 s are 39.7 s
    assert timeouts_of([run(8, 9, 10, 11, 12)], 100).hang_s == pytest.approx(10 + 148.26)
    outlier = timeouts_of([run(1, 1, 1, 1, 500)], PATIENCE)
    assert (outlier.hang_s, outlier.late_s) == (10, 30)


def test_steps_with_a_save_have_no_usual_length_and_few_steps_none_at_all():
    first = trace(0).steps[0]
    slow = first._replace(end_s=first.begin_s + 50, is_plain=False)
    mixed = replace(trace(0), steps=(*trace(0).steps, *(slow,) * 20))
    assert timeouts_of([mixed], PATIENCE).step_s == pytest.approx(STEP_S)
    early = replace(trace(0), steps=trace(0).steps[:2])
    assert timeouts_of([early], PATIENCE) == (None, PHASE_S, PHASE_S, PHASE_S)


# Ranks that have ended


def test_a_rank_whose_process_is_gone_has_crashed():
    gone = replace(trace(2), process="gone", heartbeat_s=NOW_S - 0.3)
    lost = [replace(trace(r), process="gone", state="lost") for r in (0, 1, 3)]
    found = verdict(*lost, gone)
    assert found is not None
    assert (found.kind, found.ranks) == ("crash", (2,))
    assert found.evidence.startswith("its process is gone, after step 10")


def test_a_rank_that_has_failed_is_named_and_not_those_that_it_has_left():
    failed = replace(trace(1), process="gone", state="failed")
    lost = replace(trace(0), process="running", state="lost")
    found = verdict(lost, failed)
    assert found is not None
    assert (found.kind, found.ranks) == ("crash", (1,))
    assert "an error of its own" in found.evidence


def test_of_ranks_that_end_together_the_one_is_named_that_did_not_wait():
    """A launcher ends the others at once; a heartbeat is up to a tenth of a second old."""
    ended = [replace(waits(r, WORLD, 5), process="gone") for r in (0, 1, 3)]
    ended = [replace(t, heartbeat_s=NOW_S - 0.15) for t in ended]
    culprit = replace(left(2, WORLD, 4), process="gone", heartbeat_s=NOW_S - 0.1)
    found = verdict(*ended, culprit)
    assert found is not None
    assert found.ranks == (2,)


def test_a_run_that_is_done_is_no_fault():
    done = [replace(trace(r), process="gone", state="done") for r in range(4)]
    assert verdict(*done) is None


# Hangs


def test_who_never_came_is_named():
    found = verdict(waits(0, WORLD, 7), waits(1, WORLD, 7), left(2, WORLD, 6), waits(3, WORLD, 7))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (2,))
    assert "rank(s) 0, 1, 3 have waited up to 20.0 s in all-reduce 7 of world" in found.evidence
    assert "its process runs and has not come; last in all-reduce 6" in found.evidence


@pytest.mark.parametrize(("is_stopped", "limit_s"), [(True, FLOOR_S), (False, LATE_FLOOR_S)])
def test_nobody_is_named_before_the_timeout(is_stopped, limit_s):
    culprit = stopped(left(2, WORLD, 6), since_s=3.0) if is_stopped else left(2, WORLD, 6)

    def after(for_s: float) -> Verdict | None:
        culprit_now = replace(culprit, process="running") if for_s < FLOOR_S else culprit
        return verdict(*(waits(r, WORLD, 7, for_s=for_s) for r in (0, 1, 3)), culprit_now)

    assert after(limit_s - 0.1) is None
    found = after(limit_s + 0.1)
    assert found is not None
    assert found.ranks == (2,)


@pytest.mark.parametrize("phase", ["starting", "saving", "evaluating"])
def test_while_a_rank_does_something_else_others_wait_for_longer(phase):
    saves = replace(left(2, WORLD, 6), phase=phase)

    def after(for_s: float) -> Verdict | None:
        return verdict(*(waits(r, WORLD, 7, for_s=for_s) for r in (0, 1, 3)), saves)

    assert after(100.0) is None
    found = after(PHASE_S + 1)
    assert found is not None
    assert found.ranks == (2,)


def test_a_stopped_process_is_told_from_one_that_is_late():
    halted = stopped(left(2, WORLD, 6), since_s=3.0)
    found = verdict(waits(0, WORLD, 7), waits(1, WORLD, 7), halted, left(3, WORLD, 6))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (2,))  # and not rank 3, which is on its way
    assert "its process is stopped" in found.evidence


def test_a_process_that_stops_inside_a_collective_is_named():
    inside = stopped(waits(1, WORLD, 7), since_s=3.0)
    found = verdict(waits(0, WORLD, 7), inside, waits(2, WORLD, 7), waits(3, WORLD, 7))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (1,))


def test_a_stopped_process_that_nobody_waits_for_is_named_too():
    found = verdict(trace(0), stopped(trace(1), since_s=3.0))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (1,))


def test_a_machine_that_has_been_suspended_is_no_ranks_fault():
    assert verdict(*(stopped(waits(r, WORLD, 7), since_s=60.0) for r in range(4))) is None


def test_where_all_have_come_and_none_leaves_it_is_the_transport():
    found = verdict(*(waits(rank, WORLD, 7) for rank in range(4)))
    assert found is not None
    assert (found.kind, found.ranks) == ("transport", (0, 1, 2, 3))


def test_who_waits_is_followed_to_who_waits_for_nobody():
    """Ranks 0 and 1 wait for 2, which waits for 3, which is nowhere."""
    found = verdict(
        waits(0, group(0, 1, 2), 4),
        waits(1, group(0, 1, 2), 4),
        trace(2, call(way(3, 2), 9, NOW_S - LONG_S, None, operation="receive")),
        trace(3, reached={way(3, 2): 8}),
    )
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (3,))


def test_a_sent_tensor_that_does_not_come_is_the_transports_fault():
    found = verdict(
        trace(0, call(way(1, 0), 3, NOW_S - LONG_S, None, operation="receive")),
        trace(1, reached={way(1, 0): 3}),
    )
    assert found is not None
    assert (found.kind, found.ranks) == ("transport", (0, 1))


def test_ranks_that_wait_for_each_other_are_a_deadlock():
    found = verdict(
        trace(0, call(way(1, 0), 3, NOW_S - LONG_S, None, operation="receive")),
        trace(1, call(way(2, 1), 3, NOW_S - LONG_S, None, operation="receive")),
        trace(2, call(way(0, 2), 3, NOW_S - LONG_S, None, operation="receive")),
        trace(3),
    )
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (0, 1, 2))
    assert "deadlock" in found.evidence


def test_a_rank_that_never_started_is_named():
    found = verdict(*(waits(rank, WORLD, 1) for rank in (0, 1, 2)))
    assert found is not None
    assert (found.kind, found.ranks) == ("hang", (3,))
    assert "left or never came" in found.evidence


def test_a_receive_that_nobody_waits_for_yet_is_no_hang():
    posted = call(way(1, 0), 3, NOW_S - 30, None, operation="receive")._replace(wait_s=None)
    assert verdict(trace(0, posted), trace(1)) is None


# Stragglers


def test_a_rank_that_comes_ten_steps_late_is_named():
    arrivals = [[0.1 * n] * 4 for n in range(12)]
    late = [[t, t, t + 1.0, t] for t in [1.2]]
    found = verdict(*meetings([*arrivals, *late]))
    assert found is not None
    assert (found.kind, found.ranks) == ("straggler", (2,))
    assert "10.0 median steps" in found.evidence


def test_the_charge_goes_on_to_whom_a_late_rank_has_waited_for():
    """Rank 1 comes late to rank 0 because it has waited for rank 2, which has slept."""
    slept = [
        trace(0, call(group(0, 1), 1, 0.0, 1.1)),
        trace(
            1,
            call(way(2, 1), 1, 0.0, 1.01, operation="receive"),
            call(group(0, 1), 1, 1.02, 1.1),
        ),
        trace(2, call(way(2, 1), 1, 1.0, None, operation="send")._replace(wait_s=None)),
    ]
    found = verdict(*slept)
    assert found is not None
    assert (found.kind, found.ranks) == ("straggler", (2,))


def test_a_rank_that_is_late_every_time_is_named():
    """Each step others wait for rank 3 six tenths of the time: too little for a single stall."""
    arrivals = [[0.1 * n, 0.1 * n, 0.1 * n, 0.1 * n + 0.06] for n in range(20)]
    found = verdict(*meetings(arrivals, group(0, 1, 2, 3)))
    assert found is not None
    assert (found.kind, found.ranks) == ("straggler", (3,))


def test_a_longer_stage_of_a_pipeline_is_no_straggler():
    arrivals = [[0.1 * n, 0.1 * n, 0.1 * n, 0.1 * n + 0.06] for n in range(20)]
    assert verdict(*meetings(arrivals, group(0, 1, 2, 3, axis="pp"))) is None


def test_a_long_save_is_no_stall():
    traces = meetings([[0.0, 0.0, 5.0, 0.0]])
    saves = [replace(t, calls=tuple(c._replace(phase="saving") for c in t.calls)) for t in traces]
    assert verdict(*saves) is None


def test_a_call_of_which_a_member_has_forgotten_its_own_says_nothing():
    traces = meetings([[0.0, 0.0, 5.0, 0.0]])
    traces[2] = replace(traces[2], calls=())  # its ring has gone round
    assert verdict(*traces) is None


@given(
    jitter=st.lists(st.lists(st.floats(0, 0.045), min_size=4, max_size=4), min_size=12, max_size=40)
)
def test_a_clean_trace_raises_no_alarm(jitter):
    """Whoever is late by less than half a step is not late enough, however often."""
    arrivals = [[STEP_S * n + late for late in times] for n, times in enumerate(jitter)]
    assert verdict(*meetings(arrivals, group(0, 1, 2, 3))) is None
    assert verdict(*meetings(arrivals)) is None
