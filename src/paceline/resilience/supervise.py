"""The supervisor of a run: starts its ranks, and starts them again as long as that helps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from paceline.core.clock import Clock
from paceline.core.errors import RankError
from paceline.core.record import Record
from paceline.plan.difference import changed_keys
from paceline.plan.plan import Plan
from paceline.resilience.decide import Ending, Stop, decide
from paceline.resilience.records import RecoveredRecord, RestartRecord

_POLL_S = 0.1


class Start(Protocol):
    """What ranks start from, as far as the supervisor looks at it."""

    @property
    def plan(self) -> Plan:
        """How they run."""
        ...

    @property
    def step(self) -> int:
        """The last step that has been taken and saved."""
        ...


S = TypeVar("S", bound=Start)


class Progress(Protocol):
    """What ranks have got done since their start."""

    def begin(self) -> None:
        """Counts from now on."""
        ...

    def last_step(self) -> int | None:
        """The last step that any of them has finished; None while there is none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Means(Generic[S]):
    """What a supervisor can do to a run.

    Attributes:
        launch: runs the ranks to their end; raises RankError where they fail.
        again: what they start from after that, under the plan that they had: the newest checkpoint
            that is whole, or the beginning.
        shrink: the same for at most so many ranks; None where no layout is that small.
        progress: of the ranks.
        record: writes down what has happened.
        say: tells the person at the terminal.
        clock: what time is read from.
    """

    launch: Callable[[S], None]
    again: Callable[[S], S]
    shrink: Callable[[S, int], S | None]
    progress: Progress
    record: Callable[[Record], None]
    say: Callable[[str], None]
    clock: Clock


def supervise(start: S, means: Means[S]) -> None:
    """Runs the ranks to the end of the run, again and again if need be.

    Args:
        start: what they start from at first; its plan says what becomes of failures.
        means: what there is to start them with.

    Raises:
        RankError: they have failed, and another start would not help; the error says why not.
        PacelineError: there is nothing whole to start them from.
    """
    endings: list[Ending] = []
    failed_s = means.clock.now_s()
    while True:
        means.progress.begin()
        try:
            with _first_step_timed(len(endings), failed_s, means):
                means.launch(start)
            return
        except RankError as error:
            failed_s = means.clock.now_s()
            step = means.progress.last_step()
            endings.append(Ending.of(error, start.step if step is None else step))
            start = _mended(start, endings, error, means)


def _mended(start: S, endings: list[Ending], error: RankError, means: Means[S]) -> S:
    """What to start from after an error; raises it where that would not help."""
    decision, config = decide(endings, start.plan.resilience), start.plan.resilience
    if isinstance(decision, Stop):
        raise _with_reason(error, decision.reason)
    last = endings[-1]
    means.say(last.why)
    then = means.again(start)
    if decision.num_lost:
        num_left = start.plan.mesh.num_ranks - decision.num_lost
        smaller = means.shrink(then, num_left)
        if smaller is None:
            raise _with_reason(error, f"no smaller layout is legal on {num_left} rank(s)")
        then = smaller
    record = RestartRecord(
        restart=len(endings),
        why=last.why,
        ranks=last.ranks,
        failed_step=last.step,
        resumed_step=then.step,
        num_lost_steps=max(0, last.step - then.step),
        num_ranks=then.plan.mesh.num_ranks,
        changes=changed_keys(start.plan, then.plan),
    )
    means.record(record)
    means.say(_restart_line(record, config.max_restarts))
    return then


def _restart_line(record: RestartRecord, max_restarts: int) -> str:
    changes = ", ".join(f"{key} = {value}" for key, value in record.changes.items())
    return (
        f"restart {record.restart} of at most {max_restarts}, from step "
        f"{record.resumed_step} on {record.num_ranks} rank(s){changes and ', now ' + changes}"
    )


def _with_reason(error: RankError, reason: str) -> RankError:
    """The error, which says in its first line why the run is not started again."""
    if reason:
        first, newline, rest = error.message.partition("\n")
        error.message = f"{first}; {reason}{newline}{rest}"
    return error


@contextmanager
def _first_step_timed(restart: int, failed_s: float, means: Means[S]) -> Generator[None]:
    """Writes down how long after a failure the first step is finished, in the background."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_POLL_S):
            if (step := means.progress.last_step()) is not None:
                time_s = means.clock.now_s() - failed_s
                means.record(RecoveredRecord(restart=restart, step=step, time_s=time_s))
                means.say(f"step {step} is finished {time_s:.1f} s after the failure")
                return

    thread = threading.Thread(target=watch, daemon=True)
    if restart:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if restart:
            thread.join()
