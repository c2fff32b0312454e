"""Tensors to disk and back, through torch's distributed checkpoint."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import paceline
from paceline.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    complete_checkpoints,
    read_manifest,
    verify_files,
)
from paceline.checkpoint.parts import PartsReader, PartsWriter
from paceline.core.errors import DataError, PacelineError
from paceline.core.files import sha256, sync_file
from paceline.dist.world import World
from paceline.optim.parts import Part
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


def save(
    folder: Path,
    step: int,
    parts: Mapping[str, Part],
    plan: Plan,
    spec: ModelSpec,
    world: World,
) -> Path:
    """Writes ``folder/step-N``; called by every rank with what it holds.

    A kill at any point leaves the complete checkpoints of other steps, and at most a folder
    without a manifest, which no reader takes for a checkpoint and which the next save of that
    step replaces.

    Returns:
        The checkpoint, complete once this returns on the first rank.

    Raises:
        PacelineError: it could not be written, for example for want of space.
    """
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
        _manifest(target, step, plan, spec).commit(target)
        sync_file(folder)
        shutil.rmtree(retired, ignore_errors=True)
        _drop_old(folder, plan.checkpoint.keep)
    world.barrier()
    return target


def load(checkpoint: Path, parts: Mapping[str, Part], world: World) -> Manifest:
    """Fills parts of tensors in place from a checkpoint; called by every rank.

    Args:
        checkpoint: a complete checkpoint.
        parts: where to put what it holds, as this run spreads it.
        world: the ranks.

    Raises:
        DataError: a damaged file, or tensors that are not the checkpoint's.
    """
    manifest = read_manifest(checkpoint)
    if world.is_first:
        verify_files(checkpoint, manifest)
    world.barrier()
    _require_same(checkpoint, manifest, parts, world)
    _read(checkpoint, parts, no_dist=world.mesh.num_ranks == 1)
    return manifest


def load_whole(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, in this process alone.

    Raises:
        DataError: a damaged file.
    """
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    tensors = {
        name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for name, entry in manifest.tensors.items()
        if name.startswith(prefix)
    }
    parts = {name: Part.of_whole(tensor) for name, tensor in tensors.items()}
    _read(checkpoint, parts, no_dist=True)
    return tensors


def _write(target: Path, parts: Mapping[str, Part], *, no_dist: bool) -> None:
    named: dict[str, object] = {name: part.local for name, part in parts.items()}
    try:
        with _quiet():
            writer = FileSystemWriter(target, sync_files=True)
            planner = PartsWriter(parts)
            dcp.save(named, storage_writer=writer, planner=planner, no_dist=no_dist)
    except OSError as error:
        hint = "is there space? The complete checkpoints are as they were"
        raise PacelineError(f"{target} cannot be written: {error}", hint=hint) from error


def _read(checkpoint: Path, parts: Mapping[str, Part], *, no_dist: bool) -> None:
    named: dict[str, object] = {name: part.local for name, part in parts.items()}
    try:
        with _quiet():
            reader, planner = FileSystemReader(checkpoint), PartsReader(parts)
            dcp.load(named, storage_reader=reader, planner=planner, no_dist=no_dist)
    except Exception as error:  # whatever torch stumbles over in files that are not its own
        raise DataError(f"{checkpoint} cannot be read: {error}") from error


def _require_same(
    checkpoint: Path, manifest: Manifest, parts: Mapping[str, Part], world: World
) -> None:
    names = {name for of_rank in world.collect(list(parts)) for name in of_rank}
    for name in manifest.tensors.keys() ^ names:
        side = "the checkpoint" if name in manifest.tensors else "this run"
        raise DataError(
            f"{checkpoint}: only {side} has the tensor {name}",
            hint="resume with the model and the plan of the run that saved it",
        )
    for name, part in parts.items():
        if (shape := part.place.shape) != manifest.tensors[name].shape:
            stored = manifest.tensors[name].shape
            raise DataError(f"{checkpoint}: {name} has shape {stored}, this run wants {shape}")


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


@contextmanager
def _quiet() -> Generator[None]:
    """Silences what torch says of a process without a group, which is what we asked for.

    Of torch's bundle of what went wrong on all ranks, interrupts among it, the first is raised.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        warnings.filterwarnings("ignore", message=".*TypedStorage is deprecated.*")
        try:
            yield
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise cause from None
