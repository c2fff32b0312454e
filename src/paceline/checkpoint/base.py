"""How a run is saved: the contract of its methods, and what they tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from paceline.checkpoint.manifest import Progress
from paceline.core.record import Record
from paceline.dist.world import World
from paceline.optim.parts import NamedParts
from paceline.plan.declared import Declared
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class SavedRun:
    """The run that a saver saves.

    Attributes:
        folder: of the run.
        plan: in force.
        spec: of the model; None of a module that is a user's own.
        world: the ranks.
        declared: what tensors are made of, by name.
    """

    folder: Path
    plan: Plan
    spec: ModelSpec | None
    world: World
    declared: Mapping[str, Declared] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRecord(Record):
    """A checkpoint is complete on a level.

    Attributes:
        step: that it holds.
        path: where it is.
        level: as the plan names it.
        time_s: that training stood still for it; on levels that are filled with copies, none.
        stall_s: of these, what it waited for writers: until the save before was complete, and
            until the state had been copied.
        write_s: from the begin of the save, or of the copy, until it was complete.
        size_bytes: of its files, over all ranks.
    """

    kind: ClassVar[str] = "save"
    step: int
    path: str
    level: str
    time_s: float
    stall_s: float
    write_s: float
    size_bytes: int

    def __str__(self) -> str:
        where = "" if self.level == "disk" else f" ({self.level})"
        return (
            f"saved {self.path}{where}: {self.size_bytes / 1e6:,.0f} MB in {self.write_s:.1f} s, "
            f"training stood still for {self.time_s:.2f} s"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LostSaveRecord(Record):
    """A save has failed, and the run goes on without it.

    Attributes:
        step: whose state is not on disk.
        level: that it was for.
        why: it failed.
    """

    kind: ClassVar[str] = "lost-save"
    step: int
    level: str
    why: str

    def __str__(self) -> str:
        return f"warning: step {self.step} is not saved on {self.level}: {self.why}"


Told = SaveRecord | LostSaveRecord
"""What has become of a save."""


class Saver(Protocol):
    """Saves a run; every rank has one and calls it in the same order.

    Called by the thread that trains. `begin`, `finish` and a `fence` before
    a step that is saved are collective, the others are not.
    A saver is made, by ``build(run, parts)``, before the first step, with parts that lie as all
    later ones do.
    """

    def begin(self, step: int, parts: NamedParts, progress: Progress | None = None) -> None:
        """Begins to save a state, which must not change before `fence` has returned.

        Waits for the save before it, of which one that has failed is told by all ranks alike.

        Args:
            step: whose state it is.
            parts: of this rank, as they lay when the saver was made.
            progress: of the run, for the manifest.

        Raises:
            RankError: ranks hold different bits of what should be copies.
            PacelineError: the save before it has failed, or this one cannot begin.
        """
        ...

    def fence(self, *, is_due: bool = False) -> None:
        """Returns once the state may change; at once where nothing has been begun.

        Args:
            is_due: whether the step that is about to be taken will be saved. Then the save before
                must be complete first, on all ranks, so that a run that is killed has lost no more
                than the steps since.
        """
        ...

    def poll(self) -> list[Told]:
        """What has become of saves since it was last asked; waits for nothing.

        Raises:
            PacelineError: a save has failed, and the plan says to stop.
        """
        ...

    def finish(self) -> list[Told]:
        """Waits until all that has been begun is complete on all levels, as the run ends well.

        Raises:
            PacelineError: a save has failed, and the plan says to stop.
        """
        ...

    def close(self) -> None:
        """Ends the saver's threads; what is being written is completed if other ranks let it.

        Raises nothing: it is called too where the run has failed.
        """
        ...
