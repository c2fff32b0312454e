"""Tensors to disk, through torch's distributed checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import paceline
from paceline.checkpoint.copies import check_copies
from paceline.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Progress,
    TensorEntry,
    complete_checkpoints,
)
from paceline.checkpoint.parts import PartsWriter
from paceline.checkpoint.quiet import quiet
from paceline.core.errors import PacelineError
from paceline.core.files import sha256, sync_file
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
    spec: ModelSpec,
    world: World,
    *,
    progress: Progress | None = None,
    declared: Mapping[str, Declared] | None = None,
) -> Path:
    """Writes ``folder/step-N``; called by every rank with what it holds.

    A kill at any point leaves the complete checkpoints of other steps, and at most a folder
    without a manifest, which no reader takes for a checkpoint and which the next save of that
    step replaces.

    Returns:
        The checkpoint, complete once this returns on the first rank.

    Raises:
        RankError: ranks hold different bits of what should be copies; nothing has been written.
        PacelineError: it could not be written, for example for want of space.
    """
    check_copies(parts, world)
    target = folder / f"step-{step}"
    retired = folder / f".retired-step-{step}"
    if world.is_first:
        for left in folder.glob(".retired-*"):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        if target.exists():
            target.rename(retired)
        target.mkdir(parents=True)
    world.barrier()
    _write(target, parts, no_dist=world.mesh.num_ranks == 1)
    if world.is_first:
        _manifest(target, step, plan, spec).stating(progress, declared or {}).commit(target)
        sync_file(folder)
        shutil.rmtree(retired, ignore_errors=True)
        _drop_old(folder, plan.checkpoint.keep)
    world.barrier()
    return target


def _write(target: Path, parts: NamedParts, *, no_dist: bool) -> None:
    parts = named_parts(parts)
    named: dict[str, object] = {name: part.local for name, part in parts}
    try:
        with quiet():
            writer = FileSystemWriter(target, sync_files=True)
            planner = PartsWriter(parts)
            dcp.save(named, storage_writer=writer, planner=planner, no_dist=no_dist)
    except OSError as error:
        hint = "is there space? The complete checkpoints are as they were"
        raise PacelineError(f"{target} cannot be written: {error}", hint=hint) from error


def _manifest(target: Path, step: int, plan: Plan, spec: ModelSpec) -> Manifest:
    stored = FileSystemReader(target).read_metadata().state_dict_metadata
    files = sorted(file for file in target.iterdir() if file.is_file())
    return Manifest(
        step=step,
        versions={"paceline": paceline.__version__, "torch": torch.__version__},
        plan=plan.to_dict(),
        model=spec.to_dict(),
        files={f.name: FileEntry(f.stat().st_size, sha256(f)) for f in files},
        tensors={
            name: TensorEntry(tuple(t.size), str(t.properties.dtype).removeprefix("torch."))
            for name, t in stored.items()
            if isinstance(t, TensorStorageMetadata)
        },
    )


def _drop_old(folder: Path, keep: int) -> None:
    for old in complete_checkpoints(folder)[:-keep] if keep else []:
        # Out of sight first: a kill in the middle must not leave half a checkpoint.
        retired = old.with_name(f".retired-{old.name}")
        old.rename(retired)
        shutil.rmtree(retired)
