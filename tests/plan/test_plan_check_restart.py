from __future__ import annotations

import pytest

from paceline.plan.check import check
from paceline.plan.plan import Plan


@pytest.mark.parametrize("way", ["restart", "shrink"])
def test_a_run_that_is_started_again_says_how_often(way):
    (problem,) = check(Plan().with_overrides([f"resilience.on_failure={way}"]))
    assert (problem.path, problem.value) == ("resilience.max_restarts", "0")
    assert problem.rule == f"never starts a run again, and resilience.on_failure = {way}"
    given = [f"resilience.on_failure={way}", "resilience.max_restarts=1"]
    assert check(Plan().with_overrides(given)) == []


def test_restarts_are_for_runs_that_are_started_again():
    (problem,) = check(Plan().with_overrides(["resilience.max_restarts=2"]))
    assert problem.path == "resilience.max_restarts"
    assert problem.hint.endswith('or set resilience.on_failure = "restart"')


def test_smaller_plans_are_for_runs_that_shrink():
    plans = 'resilience.shrink_plans=["a.toml"]'
    ways = ["resilience.on_failure=restart", "resilience.max_restarts=1"]
    (problem,) = check(Plan().with_overrides([plans, *ways]))
    assert problem.path == "resilience.shrink_plans"
    assert problem.rule == "is not read by resilience.on_failure = restart"
    ways[0] = "resilience.on_failure=shrink"
    assert check(Plan().with_overrides([plans, *ways])) == []
