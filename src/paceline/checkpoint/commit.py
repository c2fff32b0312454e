"""A checkpoint's folder, from out of sight to its name, and out of sight again."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

import paceline
from paceline.checkpoint.base import SavedRun
from paceline.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Progress,
    TensorEntry,
    complete_checkpoints,
    step_of,
)
from paceline.core.files import sync_file
from paceline.plan.plan import CheckpointConfig

_UNFINISHED, _RETIRED = ".unfinished-", ".retired-"


def unfinished(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / f"{_UNFINISHED}step-{step}"


def open_unfinished(folder: Path, step: int) -> Path:
    """Makes the folder that the checkpoint of a step is written into, empty.

    What kills have left goes; the complete checkpoint of that step, if there is one, stays until
    it is replaced.
    """
    for prefix in (_UNFINISHED, _RETIRED):
        for left in folder.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
    path = unfinished(folder, step)
    path.mkdir(parents=True)
    return path


def commit(folder: Path, step: int) -> Path:
    """Gives an unfinished checkpoint, all of whose files are on disk, its name."""
    target = folder / f"step-{step}"
    replaced = folder / f"{_RETIRED}step-{step}"
    if target.exists():
        target.rename(replaced)
    unfinished(folder, step).rename(target)
    sync_file(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def drop_old(folder: Path, config: CheckpointConfig, spared: Collection[Path] = ()) -> None:
    """Removes the complete checkpoints that are not to be kept.

    Args:
        folder: of checkpoints.
        config: how many are kept.
        spared: those that are being read.
    """
    complete = {step_of(p): p for p in complete_checkpoints(folder)}
    for step in sorted(complete.keys() - kept(complete, config)):
        if complete[step] not in spared:
            drop(complete[step])


def kept(steps: Collection[int], config: CheckpointConfig) -> set[int]:
    """Of the steps of complete checkpoints, those that stay: the newest, and every n-th."""
    if not config.keep:
        return set(steps)
    every = config.keep_every
    return set(sorted(steps)[-config.keep :]) | {s for s in steps if every and s % every == 0}


def drop(checkpoint: Path) -> None:
    """Removes a checkpoint, out of sight first: a kill must not leave half of one."""
    retired = checkpoint.with_name(f"{_RETIRED}{checkpoint.name}")
    checkpoint.rename(retired)
    shutil.rmtree(retired)


def manifest_of(
    step: int,
    run: SavedRun,
    metadata: Metadata,
    files: Mapping[str, FileEntry],
    progress: Progress | None,
) -> Manifest:
    """What a checkpoint holds.

    Args:
        step: that is saved.
        run: whose state it is.
        metadata: torch's account of its tensors.
        files: of the checkpoint.
        progress: of the run.
    """
    manifest = Manifest(
        step=step,
        versions={"paceline": paceline.__version__, "torch": torch.__version__},
        plan=run.plan.to_dict(),
        model={} if run.spec is None else run.spec.to_dict(),
        files=dict(sorted(files.items())),
        tensors={
            name: TensorEntry(tuple(t.size), str(t.properties.dtype).removeprefix("torch."))
            for name, t in metadata.state_dict_metadata.items()
            if isinstance(t, TensorStorageMetadata)
        },
    )
    return manifest.stating(progress, run.declared)
