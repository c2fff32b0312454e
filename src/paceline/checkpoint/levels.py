"""Where checkpoints lie: in memory, in the run's folder, in another folder; and which are there.

Every level holds ``step-N`` folders of the same form. The first is written by the ranks, and each
slower one is filled with copies.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.checkpoint.base import SavedRun
from paceline.checkpoint.manifest import complete_checkpoints, step_of
from paceline.core.errors import PacelineError, UsageError

MEMORY, DISK = "memory", "disk"
_MEMORY = Path("/dev/shm")  # of the machine: it outlives processes, and not a reboot
_HASH_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete checkpoint that a run can go on from.

    Attributes:
        step: that it holds.
        level: as the plan names it.
        path: of the checkpoint.
    """

    step: int
    level: str
    path: Path


def candidates(run_folder: Path, levels: Sequence[str]) -> list[Candidate]:
    """The complete checkpoints of a run: newest step first, of one step the fastest level first.

    Complete is one that has a manifest; whether its files are as they were, its reader finds out,
    and goes on to the next of the list where they are not.

    Args:
        run_folder: of the run.
        levels: `checkpoint.levels` of its plan.
    """
    found = [
        (-step_of(path), place, path)
        for place, level in enumerate(levels)
        for path in complete_checkpoints(level_folder(run_folder, level))
    ]
    return [Candidate(-step, levels[place], path) for step, place, path in sorted(found)]


def level_folder(run_folder: Path, level: str) -> Path:
    """Where a level keeps the checkpoints of a run; of its own for every run, and not made yet."""
    if level == DISK:
        return run_folder / "checkpoints"
    if level == MEMORY:
        return memory_folder(run_folder) / "checkpoints"
    return Path(level).expanduser() / f"{run_folder.resolve().name}-{_hash(run_folder)}"


def require_levels(run: SavedRun) -> None:
    """Refuses levels that the ranks of a run do not share; called by all of them.

    Raises:
        UsageError: `memory`, where the ranks are on several machines.
    """
    if MEMORY not in run.plan.checkpoint.levels:
        return
    machines = sorted(set(run.world.collect(platform.node())))
    if len(machines) > 1:
        raise UsageError(
            f'checkpoint.levels has "{MEMORY}", but the ranks are on {", ".join(machines)}',
            hint="a level must be a folder that all machines share",
        )


def require_run_folder(run: SavedRun) -> None:
    """Refuses to save a run whose folder has vanished: nobody could resume it.

    Raises:
        PacelineError: it has.
    """
    if not run.folder.is_dir():
        raise PacelineError(f"the run's folder {run.folder} has vanished", hint="was it moved?")


def memory_folder(run_folder: Path) -> Path:
    """What a run keeps in the machine's memory."""
    return _MEMORY / f"paceline-{os.getuid()}-{_hash(run_folder)}"


def _hash(run_folder: Path) -> str:
    """Tells runs apart by where they lie."""
    path = str(run_folder.resolve())
    return hashlib.sha256(path.encode()).hexdigest()[:_HASH_DIGITS]
