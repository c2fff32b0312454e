"""Tensors to disk, through torch's distributed checkpoint, while the caller waits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from paceline.checkpoint.agree import agreed
from paceline.checkpoint.base import SavedRun
from paceline.checkpoint.commit import (
    commit,
    drop_old,
    manifest_of,
    open_unfinished,
    unfinished,
)
from paceline.checkpoint.copies import check_copies
from paceline.checkpoint.manifest import Progress, file_entries
from paceline.checkpoint.parts import PartsWriter
from paceline.checkpoint.quiet import quiet
from paceline.core.errors import PacelineError
from paceline.dist.world import World
from paceline.optim.parts import NamedParts, named_parts
from paceline.plan.declared import Declared
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


def save(
    folder: Path,
    step: int,
    parts: NamedParts,
    plan: Plan,
    spec: ModelSpec | None,
    world: World,
    *,
    progress: Progress | None = None,
    declared: Mapping[str, Declared] | None = None,
) -> Path:
    """Writes ``folder/step-N``; called by every rank with what it holds.

    A kill at any point leaves the complete checkpoints of other steps, and at most a hidden
    folder, which no reader takes for a checkpoint and which the next save removes.

    Returns:
        The checkpoint, complete once this returns on any rank.

    Raises:
        RankError: ranks hold different bits of what should be copies; nothing has been written.
        PacelineError: it could not be written, for example for want of space.
    """
    check_copies(parts, world)
    target = folder / f"step-{step}"
    run = SavedRun(target, plan, spec, world, declared or {})
    try:
        agreed(world, lambda: open_unfinished(folder, step) if world.is_first else None)
        _write(unfinished(folder, step), parts, no_dist=world.mesh.num_ranks == 1)
        agreed(world, lambda: _commit(folder, step, run, progress) if world.is_first else None)
    except OSError as error:
        raise not_written(target, error) from error
    return target


def not_written(target: Path, error: Exception) -> PacelineError:
    """What a user reads of a checkpoint that cannot be written."""
    hint = "is there space? The complete checkpoints are as they were"
    return PacelineError(f"{target} cannot be written: {error}", hint=hint)


def _write(target: Path, parts: NamedParts, *, no_dist: bool) -> None:
    parts = named_parts(parts)
    named: dict[str, object] = {name: part.local for name, part in parts}
    with quiet():
        writer = FileSystemWriter(target, sync_files=True)
        planner = PartsWriter(parts)
        dcp.save(named, storage_writer=writer, planner=planner, no_dist=no_dist)


def _commit(folder: Path, step: int, run: SavedRun, progress: Progress | None) -> None:
    """Makes a written checkpoint complete, and removes those that are too old."""
    path = unfinished(folder, step)
    files = file_entries(path.iterdir())
    metadata = FileSystemReader(path).read_metadata()
    manifest_of(step, run, metadata, files, progress).commit(path)
    commit(folder, step)
    drop_old(folder, run.plan.checkpoint)
