"""Ranks that are watched while they run: one that hangs is ended, and the error says who it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from paceline.core.errors import RankError
from paceline.core.record import Record
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import Plan
from paceline.resilience.records import VerdictRecord
from paceline.resilience.verdict import Verdict
from paceline.resilience.watch import Watcher, pids

_ENDS = ("hang", "transport")  # what a run does not come out of by itself
_FIGURES = {
    "hang": "hangs",
    "transport": "is stuck in a collective that all have come to",
    "straggler": "is late again and again",
    "slow-sender": "sends slowly",
    "slow-receiver": "receives slowly",
    "slow-link": "is at the end of a slow link",
    "crash": "has ended",
}


def run_watched(
    launch: Callable[[], None],
    folder: Path,
    plan: Plan,
    *,
    record: Callable[[Record], None],
    say: Callable[[str], None],
) -> None:
    """Runs ranks to their end; what is slow is told, what hangs is killed.

    Args:
        launch: runs the ranks; raises RankError where they fail.
        folder: of the run.
        plan: of the run.
        record: writes down what is found.
        say: tells the person at the terminal.

    Raises:
        RankError: a rank has failed, or was found to hang.
    """
    fatal: list[Verdict] = []

    def act(verdict: Verdict) -> None:
        if verdict.kind == "crash":  # whoever has launched the ranks sees that, and why, at once
            return
        found = VerdictRecord(verdict=verdict.kind, ranks=verdict.ranks, evidence=verdict.evidence)
        record(found)
        if verdict.kind in _ENDS and not fatal:
            fatal.append(verdict)
            _kill(verdict.ranks, folder)
        elif not fatal:
            say(f"warning: {describe(verdict, plan.mesh)}")

    watcher = Watcher(folder, plan.mesh, plan.resilience.patience, act)
    watcher.start()
    try:
        launch()
    except RankError:
        if fatal:
            raise _error(fatal[0], plan.mesh) from None  # that it was killed says nothing
        raise
    finally:
        watcher.stop()


def describe(verdict: Verdict, mesh: MeshConfig) -> str:
    """A verdict as a person reads it."""
    names = " and ".join(mesh.name_rank(rank) for rank in verdict.ranks)
    return f"{names} {_FIGURES[verdict.kind]}: {verdict.evidence}"


def _error(verdict: Verdict, mesh: MeshConfig) -> RankError:
    # Of a deadlock, or a link that all wait for, no rank can be said to be at fault.
    is_known = verdict.kind == "hang" and len(verdict.ranks) < mesh.num_ranks
    return RankError(describe(verdict, mesh), ranks=verdict.ranks if is_known else ())


def _kill(ranks: tuple[int, ...], folder: Path) -> None:
    """SIGKILL ends a process that is stopped, too; the others then lose it, and end as well."""
    found = pids(folder)
    for rank in ranks:
        if rank in found:
            with suppress(ProcessLookupError):
                os.kill(found[rank], signal.SIGKILL)
