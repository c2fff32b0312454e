"""What each rank writes of a save, and how the first makes one checkpoint of it.

No collective is needed but those of `agree_on_layout`, once in a run: a rank whose files are on
disk leaves its account of them beside them, and the first rank, once it has all accounts, gives the
checkpoint its name.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from paceline.checkpoint.base import SavedRun
from paceline.checkpoint.commit import commit, manifest_of, unfinished
from paceline.checkpoint.copies import Fingerprint, Region, copied_regions, require_equal_copies
from paceline.checkpoint.fill import SlowerLevels
from paceline.checkpoint.manifest import FileEntry, Progress, file_entries
from paceline.checkpoint.parts import PartsWriter
from paceline.checkpoint.staging import StagedTensors
from paceline.core.errors import PacelineError
from paceline.core.files import write_text
from paceline.dist.world import World
from paceline.optim.parts import NamedParts, named_parts
from paceline.plan.layout import Box

_METADATA = ".metadata"
_POLL_S = 0.01

Copies = dict[Region, Fingerprint]


class Layout(NamedTuple):
    """Who writes what; the same in all saves of a run.

    Attributes:
        local: all that this rank could write.
        mine: what it does write.
        metadata: torch's account of all tensors.
        copied: what several ranks hold, and must hold alike.
    """

    local: SavePlan
    mine: SavePlan
    metadata: Metadata
    copied: frozenset[Region]


def agree_on_layout(parts: NamedParts, world: World) -> Layout:
    """Decides who writes what; collective."""
    parts = named_parts(parts)
    planner = PartsWriter(parts)
    planner.set_up_planner({})
    local = planner.create_local_plan()
    plans, metadata = planner.create_global_plan(world.collect(local))
    plans = FileSystemWriter("").prepare_global_plan(plans)
    boxes = world.collect([(name, part.place.box) for name, part in parts])
    mine = planner.finish_plan(plans[world.rank])
    return Layout(local, mine, metadata, copied_regions(boxes))


@dataclass(frozen=True, slots=True)
class SaveFiles:
    """The files of one save, written in the background.

    Attributes:
        run: whose state it is.
        folder: of checkpoints.
        step: that is saved.
        layout: who writes what.
        levels: whose first is written.
        progress: of the run.
    """

    run: SavedRun
    folder: Path
    step: int
    layout: Layout
    levels: SlowerLevels
    progress: Progress | None

    @property
    def path(self) -> Path:
        return unfinished(self.folder, self.step)

    def write_share(self, staged: StagedTensors, copies: Copies) -> None:
        """Puts what this rank writes on disk, and then its account of it.

        Args:
            staged: what it writes.
            copies: what its copies come to, once all is staged.
        """
        # Nothing is taken ahead: the room of a tensor is free once the next is asked for.
        writer = FileSystemWriter(self.path, sync_files=True, per_thread_copy_ahead=0)
        writer.set_up_storage_writer(False, rank=self.run.world.rank, use_collectives=False)
        results = writer.write_data(self.layout.mine, _FromStaged(staged)).wait()
        writer.finish(Metadata({}), [results])
        written = self.path.glob(f"{self.layout.mine.storage_data.prefix}*")
        staged.staged.wait()  # also where this rank writes nothing
        share = _Share(file_entries(written), copies)
        write_text(self._account(self.run.world.rank), share.to_json())

    def commit(self, is_over: threading.Event) -> int:
        """Waits for the accounts of all ranks, and gives the checkpoint its name.

        Args:
            is_over: set where an account will never come.

        Returns:
            The bytes of all files.
        """
        run, shares = self.run, self._collect(is_over)
        require_equal_copies([share.copies for share in shares])
        files = {name: entry for share in shares for name, entry in share.files.items()}
        reader = FileSystemReader(self.path)
        results: list[list[WriteResult]] = []
        for rank in range(run.world.mesh.num_ranks):
            stored = reader.read_metadata(rank=rank).storage_data or {}
            results.append([WriteResult(index, 0, place) for index, place in stored.items()])
            self._account(rank).unlink()
            (self.path / f"__{rank}{_METADATA}").unlink()
        writer = FileSystemWriter(self.path, sync_files=True)
        writer.finish(replace(self.layout.metadata), results)
        files |= file_entries([self.path / _METADATA])
        manifest = manifest_of(self.step, run, self.layout.metadata, files, self.progress)
        manifest.commit(self.path)
        commit(self.folder, self.step)
        self.levels.drop_old()
        return manifest.size_bytes

    def _collect(self, is_over: threading.Event) -> list[_Share]:
        """What ranks have written, in order of rank, once it is on disk."""
        shares: list[_Share] = []
        for rank in range(self.run.world.mesh.num_ranks):
            account = self._account(rank)
            while not account.exists():
                if is_over.wait(_POLL_S):
                    raise PacelineError(f"rank {rank} has not written its share")
            shares.append(_Share.from_json(account.read_text(encoding="utf-8")))
        return shares

    def _account(self, rank: int) -> Path:
        return self.path / f".share-{rank}"


class _Share(NamedTuple):
    """A rank's account of what it has written.

    Attributes:
        files: by name.
        copies: what those of its parts come to that other ranks hold too.
    """

    files: dict[str, FileEntry]
    copies: Copies

    def to_json(self) -> str:
        files = {name: asdict(entry) for name, entry in self.files.items()}
        copies = [[name, box.offsets, box.sizes, *f] for (name, box), f in self.copies.items()]
        return json.dumps({"files": files, "copies": copies})

    @classmethod
    def from_json(cls, text: str) -> _Share:
        data = json.loads(text)
        files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
        copies = {
            (name, Box(tuple(offsets), tuple(sizes))): (plain, weighted)
            for name, offsets, sizes, plain, weighted in data["copies"]
        }
        return cls(files, copies)


class _FromStaged(DefaultSavePlanner):
    """Gives torch's writer the copies, in the order of its plan."""

    def __init__(self, staged: StagedTensors) -> None:
        super().__init__(flatten_state_dict=False)
        self._staged = staged

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        tensor = self._staged.take()
        assert write_item.tensor_data is not None
        assert write_item.tensor_data.chunk.sizes == tensor.shape, "not the order of the plan"
        return tensor
