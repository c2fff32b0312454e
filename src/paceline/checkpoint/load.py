"""Tensors from disk, through torch's distributed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from paceline.checkpoint.manifest import Manifest, read_manifest, verify_files
from paceline.checkpoint.parts import PartsReader
from paceline.checkpoint.quiet import quiet
from paceline.core.errors import DataError
from paceline.dist.world import World
from paceline.optim.parts import Part


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


def _read(checkpoint: Path, parts: Mapping[str, Part], *, no_dist: bool) -> None:
    named: dict[str, object] = {name: part.local for name, part in parts.items()}
    try:
        with quiet():
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
