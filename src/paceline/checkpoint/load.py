"""Tensors from disk: checked before they are used, and whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from paceline.checkpoint.manifest import Manifest, read_manifest, verify_files
from paceline.checkpoint.reader import Stored, dtype_name
from paceline.core.errors import DataError, UsageError
from paceline.dist.world import World
from paceline.optim.parts import NamedParts, Part, named_parts


def load(checkpoint: Path, parts: NamedParts, world: World) -> Manifest:
    """Fills parts of tensors in place from a checkpoint; called by every rank.

    The layout under which it was saved may be any: every element that a rank has is read from
    where it lies. Checksums are shared out: a rank reads every n-th file for them. Nothing is
    filled on any rank unless everything is in order on all of them.

    Args:
        checkpoint: a complete checkpoint.
        parts: where to put what it holds, as this run spreads it.
        world: the ranks.

    Raises:
        DataError: a damaged file, or tensors that are not the checkpoint's; on all ranks.
        UsageError: it has the state of a gradient scaler.
    """
    parts = named_parts(parts)
    manifest = read_manifest(checkpoint)
    if manifest.progress is not None and manifest.progress.scaler is not None:
        message = f"{checkpoint} has the state of a gradient scaler, of which this version has none"
        raise UsageError(message, hint="it was saved by another version: resume with that")
    num_ranks = world.mesh.num_ranks
    _together(world, lambda: verify_files(checkpoint, manifest, world.rank, num_ranks))
    _require_same(checkpoint, manifest, parts, world)
    stored = Stored(checkpoint, manifest)
    _together(world, lambda: stored.read(parts))
    return manifest


class WholeTensors:
    """A checkpoint's whole tensors, in this process alone, some at a time.

    Args:
        checkpoint: a complete checkpoint.

    Raises:
        DataError: a damaged file.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.manifest = read_manifest(checkpoint)
        verify_files(checkpoint, self.manifest)
        self._stored = Stored(checkpoint, self.manifest)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name."""
        entries = {name: self.manifest.tensors[name] for name in names}
        tensors = {
            name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            for name, entry in entries.items()
        }
        self._stored.read({name: Part.of_whole(tensor) for name, tensor in tensors.items()})
        return tensors


def load_whole(checkpoint: Path, prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names begin with `prefix`, in this process alone.

    Raises:
        DataError: a damaged file.
    """
    whole = WholeTensors(checkpoint)
    return whole.read(name for name in whole.manifest.tensors if name.startswith(prefix))


def _together(world: World, work: Callable[[], None]) -> None:
    """Does a rank's share of something; where one rank fails, all do, for the first one's reason.

    A rank that failed alone would leave the others waiting for it.
    """
    failure: tuple[str, str] | None = None
    try:
        work()
    except DataError as error:
        failure = error.message, error.hint
    except OSError as error:
        failure = str(error), ""
    for found in world.collect(failure):
        if found is not None:
            message, hint = found
            raise DataError(message, hint=hint)


def _require_same(
    checkpoint: Path, manifest: Manifest, parts: Iterable[tuple[str, Part]], world: World
) -> None:
    """Raises DataError, on all ranks, if tensors are not those of the checkpoint."""
    mine = {n: (part.place.shape, dtype_name(part.local.dtype)) for n, part in parts}
    wanted = {name: kind for of_rank in world.collect(mine) for name, kind in of_rank.items()}
    for name in sorted(manifest.tensors.keys() ^ wanted.keys()):
        side = "the checkpoint" if name in manifest.tensors else "this run"
        raise DataError(
            f"{checkpoint}: only {side} has the tensor {name}",
            hint="resume with the model and the optimizer of the run that saved it",
        )
    for name, (shape, dtype) in wanted.items():
        entry = manifest.tensors[name]
        if shape != entry.shape:
            raise DataError(f"{checkpoint}: {name} has shape {entry.shape}, this run wants {shape}")
        if dtype != entry.dtype:
            raise DataError(
                f"{checkpoint}: {name} is of {entry.dtype}, this run holds {dtype}",
                hint=f'precision.params = "{entry.dtype}", as the run that saved it',
            )
