"""Checkpoints of a way not taken: a run that goes back behind them leaves them where they are."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from paceline.checkpoint.manifest import complete_checkpoints, step_of
from paceline.core.files import sync_file


def set_aside_after(folder: Path, step: int) -> list[Path]:
    """Renames the complete checkpoints of later steps, so that none is taken for the newest.

    They stay whole, and ``train --resume`` goes on from one that is named.

    Args:
        folder: of the checkpoints.
        step: that the run goes on from.

    Returns:
        Where they are now, oldest first.
    """
    later = [path for path in complete_checkpoints(folder) if step_of(path) > step]
    found = [path.rename(_free_name(path)) for path in later]
    if found:
        sync_file(folder)
    return found


def _free_name(checkpoint: Path) -> Path:
    """A name that no reader takes for a checkpoint: several ways may have come to the same step."""
    names = (f"superseded-{number}-{checkpoint.name}" for number in count(1))
    return next(path for name in names if not (path := checkpoint.with_name(name)).exists())
