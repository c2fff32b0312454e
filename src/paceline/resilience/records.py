"""What a supervisor writes down of a run that it has mended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paceline.core.record import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartRecord(Record):
    """The ranks have failed and are started again.

    Attributes:
        restart: number of the restart, from 1.
        why: what ended the ranks.
        ranks: whose fault it was, on the mesh that there was; none if that is unknown.
        failed_step: the last step that had been finished.
        resumed_step: the step that the run goes on from.
        num_lost_steps: steps that are taken again.
        num_ranks: ranks from now on.
        changes: keys of the plan that differ from now on, with their new values.
    """

    kind: ClassVar[str] = "restart"
    restart: int
    why: str
    ranks: tuple[int, ...]
    failed_step: int
    resumed_step: int
    num_lost_steps: int
    num_ranks: int
    changes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveredRecord(Record):
    """The first step after a restart is finished.

    Attributes:
        restart: number of the restart.
        step: that is finished.
        time_s: from the moment when the failure was noticed.
    """

    kind: ClassVar[str] = "recovered"
    restart: int
    step: int
    time_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictRecord(Record):
    """What a watcher has found.

    Attributes:
        verdict: its kind, as `Verdict` has it.
        ranks: whose fault it is.
        evidence: the figures that say so.
    """

    kind: ClassVar[str] = "verdict"
    verdict: str
    ranks: tuple[int, ...]
    evidence: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedRecord(Record):
    """A checkpoint is not whole: an older one, or a copy, is used instead.

    Attributes:
        path: of the checkpoint.
        why: what was found.
    """

    kind: ClassVar[str] = "damaged"
    path: str
    why: str
