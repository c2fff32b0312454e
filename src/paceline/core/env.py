"""The only reader of environment variables, and the folders that they decide.

Nothing here changes what a job computes: that is the plan's matter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What a launcher (`torchrun`) tells a rank."""

    rank: int
    world_size: int
    local_rank: int


def cache_folder() -> Path:
    """Where fetched models and tokenised text are kept: ``$XDG_CACHE_HOME/paceline``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "paceline"


def child_environment(**defaults: str) -> dict[str, str]:
    """What a process that this one starts is told: what this one was, and defaults for the rest."""
    return defaults | dict(os.environ)


def error_file() -> str | None:
    """Where a launcher looks for what has ended this rank; None where none does."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE")


def rank_environment() -> RankEnvironment | None:
    """The launcher's view of this process, or None where no launcher started it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return RankEnvironment(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
