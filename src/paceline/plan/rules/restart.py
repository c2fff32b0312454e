"""Rules of runs that are started again."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known


def restarts_are_counted(known: Known) -> Iterator[Problem]:
    """A run that is started again says how often, and one that is not does not."""
    resilience, path = known.plan.resilience, "resilience.max_restarts"
    if resilience.on_failure == "stop" and resilience.max_restarts:
        rule = "is for a run that is started again, and resilience.on_failure = stop"
        yield known.problem(path, rule, 'leave it out, or set resilience.on_failure = "restart"')
    elif resilience.on_failure != "stop" and not resilience.max_restarts:
        rule = f"never starts a run again, and resilience.on_failure = {resilience.on_failure}"
        yield known.problem(path, rule, 'use 3, or set resilience.on_failure = "stop"')


def shrink_plans_are_read(known: Known) -> Iterator[Problem]:
    """Smaller layouts are for a run that shrinks."""
    resilience = known.plan.resilience
    if resilience.shrink_plans and resilience.on_failure != "shrink":
        rule = f"is not read by resilience.on_failure = {resilience.on_failure}"
        yield known.problem("resilience.shrink_plans", rule, 'it is for "shrink"')
