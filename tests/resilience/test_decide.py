"""What becomes of a run whose ranks have failed."""

from __future__ import annotations

import pytest

from paceline.core.errors import RankError
from paceline.plan.plan import ResilienceConfig
from paceline.resilience.decide import MAX_SAME, Ending, Restart, Stop, decide

RESTART = ResilienceConfig(on_failure="restart", max_restarts=5)
SHRINK = ResilienceConfig(on_failure="shrink", max_restarts=5)
KILLED = Ending(7, (1,), "rank 1 was ended by SIGKILL")


def test_a_run_that_is_to_stop_stops_without_a_reason():
    assert decide([KILLED], ResilienceConfig()) == Stop()


def test_a_run_is_restarted_on_as_many_ranks_or_without_those_at_fault():
    assert decide([KILLED], RESTART) == Restart()
    assert decide([KILLED], SHRINK) == Restart(num_lost=1)
    assert decide([Ending(7, (1, 3), "a deadlock")], SHRINK) == Restart(num_lost=2)
    assert decide([Ending(7, (), "rank 0 has lost another rank")], SHRINK) == Restart()


def test_a_run_is_restarted_so_many_times_and_no_more():
    endings = [Ending(step, (1,), "killed") for step in range(1, 8)]
    config = ResilienceConfig(on_failure="restart", max_restarts=2)
    assert decide(endings[:1], config) == decide(endings[:2], config) == Restart()
    stop = decide(endings[:3], config)
    assert stop == Stop("it has been restarted 2 time(s) (resilience.max_restarts)")
    assert decide(endings[:6], RESTART) == Stop(
        "it has been restarted 5 time(s) (resilience.max_restarts)"
    )


def test_the_same_failure_again_and_again_ends_a_run_whatever_is_left():
    assert decide([KILLED] * (MAX_SAME - 1), RESTART) == Restart()
    stop = decide([KILLED] * MAX_SAME, RESTART)
    assert stop == Stop("it has come to this 3 times one after the other")
    other = Ending(8, (1,), KILLED.why)
    assert decide([KILLED, other, KILLED, KILLED], RESTART) == Restart()
    assert decide([KILLED, KILLED, other], RESTART) == Restart()
    hangs = [Ending(7, (2,), f"rank 2 hangs: for {s} s") for s in ("2.1", "3", "14.75")]
    assert isinstance(decide(hangs, RESTART), Stop)  # in other figures
    assert decide([KILLED, KILLED, hangs[0]], RESTART) == Restart()


@pytest.mark.parametrize("config", [RESTART, SHRINK])
def test_what_would_come_again_is_not_tried_again(config):
    error = RankError("rank 0: the norm is nan\nat length", ranks=(0,), comes_again=True)
    ending = Ending.of(error, 4)
    assert ending == Ending(4, (0,), "rank 0: the norm is nan", comes_again=True)
    assert decide([ending], config) == Stop("another start would come to the same")
