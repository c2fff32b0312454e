"""Parts of tensors out of a directory of torch's distributed checkpoint, however they were cut."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from paceline.checkpoint.manifest import Manifest
from paceline.checkpoint.overlap import Held, Move, moves, require_cover
from paceline.checkpoint.quiet import quiet
from paceline.core.errors import DataError, PacelineError
from paceline.optim.parts import NamedParts, Part, named_parts
from paceline.plan.layout import Box

_READER = -1  # holds no chunk of a file, so that everything it wants is moved


class Stored:
    """The chunks of a checkpoint's tensors, each element in exactly one of them.

    Args:
        checkpoint: its files are whole.
        manifest: of the checkpoint.

    Raises:
        DataError: a tensor that the chunks do not cover exactly once, or that is another than the
            manifest says; or metadata that cannot be read.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        self._checkpoint = checkpoint
        self._entries = _entries(checkpoint)
        for name in sorted(self._entries.keys() ^ manifest.tensors.keys()):
            side = "the manifest" if name in manifest.tensors else "the files"
            raise DataError(f"{checkpoint}: only {side} of it has the tensor {name}")
        for name, entry in self._entries.items():
            shape, dtype = tuple(entry.size), dtype_name(entry.properties.dtype)
            stated = manifest.tensors[name]
            if (shape, dtype) != (stated.shape, stated.dtype):
                raise DataError(
                    f"{checkpoint}: {name} is {dtype} {list(shape)} in the files, "
                    f"{stated.dtype} {list(stated.shape)} in the manifest"
                )
            try:
                require_cover(name, shape, _boxes(entry))
            except DataError as error:
                raise DataError(f"{checkpoint}: {error.message}") from error

    def read(self, parts: NamedParts) -> None:
        """Fills parts in place, each of their elements once; in this process alone.

        Raises:
            DataError: an element that is in no chunk, or a file that cannot be read.
        """
        parts = named_parts(parts)
        sources = [
            Held(name, number, box)
            for name in {name for name, _ in parts}
            for number, box in enumerate(_boxes(self._entries[name]))
        ]
        targets = [Held(name, _READER, part.place.box) for name, part in parts]
        planner = _Planner(moves(sources, targets), parts)
        # What is read comes from the planner; torch wants a dict of the names beside it.
        named: dict[str, object] = {name: part.local for name, part in parts}
        try:
            with quiet():
                reader = FileSystemReader(self._checkpoint)
                dcp.load(named, storage_reader=reader, planner=planner, no_dist=True)
        except PacelineError:
            raise
        except Exception as error:  # whatever torch stumbles over in files that are not its own
            raise DataError(f"{self._checkpoint} cannot be read: {error}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as manifests write it."""
    return str(dtype).removeprefix("torch.")


def _entries(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle can fail in any way
        raise DataError(f"{checkpoint / '.metadata'} cannot be read: {error}") from error
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, entry in metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise DataError(f"{checkpoint}: {name} is no tensor")
        tensors[name] = entry
    return tensors


def _boxes(entry: TensorStorageMetadata) -> Iterable[Box]:
    return (Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)


class _Planner(DefaultLoadPlanner):
    """Has torch read what the moves say.

    Args:
        plan: from chunks of files to parts.
        parts: what is filled.
    """

    def __init__(self, plan: Iterable[Move], parts: Iterable[tuple[str, Part]]) -> None:
        super().__init__(flatten_state_dict=False)
        self._moves = plan
        # A name may have several parts. They begin at different places, but for empty ones.
        self._local = {
            (name, part.place.box.offsets): part.local.detach()
            for name, part in parts
            if part.place.box.num_elements
        }

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([_read_item(move) for move in self._moves])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "read items name the part that they fill"
        return self._local[index.fqn, tuple(index.offset)]


def _read_item(move: Move) -> ReadItem:
    source, target = move.source.box, move.target.box
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(move.tensor, target.offsets),
        dest_offsets=_starts(move.box, target),
        storage_index=MetadataIndex(move.tensor, source.offsets, move.source.holder),
        storage_offsets=_starts(move.box, source),
        lengths=torch.Size(move.box.sizes),
    )


def _starts(inner: Box, outer: Box) -> torch.Size:
    return torch.Size(part.start for part in inner.within(outer))
