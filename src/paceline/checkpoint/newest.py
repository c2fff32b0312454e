"""The newest checkpoint that is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from paceline.checkpoint.levels import Candidate
from paceline.checkpoint.manifest import read_manifest, verify_files
from paceline.core.errors import DataError


def newest_whole(
    candidates: Iterable[Candidate], on_damaged: Callable[[Path, str], None]
) -> Path | None:
    """The first of some checkpoints whose files are all as they were saved.

    Args:
        candidates: the best first.
        on_damaged: is told of each that is passed over, and why.

    Returns:
        The checkpoint; None where there are no candidates.

    Raises:
        UsageError: one of another format.
        DataError: none of them is whole.
    """
    damaged: list[DataError] = []
    for candidate in candidates:
        try:
            verify_files(candidate.path, read_manifest(candidate.path))
        except (DataError, OSError) as error:
            is_told = isinstance(error, DataError)
            damaged.append(error if is_told else DataError(f"{candidate.path}: {error}"))
            on_damaged(candidate.path, damaged[-1].message)
        else:
            return candidate.path
    if damaged:
        hint = "mend one of them, or begin a new run in another --out"
        raise DataError(f"none of {len(damaged)} checkpoint(s) is whole", hint=hint) from damaged[0]
    return None
