"""Saves that training waits for: nothing runs in the background, nothing is held in memory."""

from __future__ import annotations

import time

from paceline.checkpoint.agree import agreed
from paceline.checkpoint.base import LostSaveRecord, SavedRun, SaveRecord, Told
from paceline.checkpoint.fill import SlowerLevels
from paceline.checkpoint.levels import level_folder, require_levels, require_run_folder
from paceline.checkpoint.manifest import Progress, read_manifest
from paceline.checkpoint.save import save
from paceline.core.errors import PacelineError
from paceline.optim.parts import NamedParts


class BlockingSaver:
    """Saves while the trainer waits.

    Args:
        run: whose state it is.
    """

    def __init__(self, run: SavedRun) -> None:
        require_levels(run)
        self._run = run
        self._levels = SlowerLevels(run)
        self._told: list[Told] = []

    def begin(self, step: int, parts: NamedParts, progress: Progress | None = None) -> None:
        plan, world = self._run.plan, self._run.world
        level = plan.checkpoint.levels[0]
        start_s = time.perf_counter()
        try:
            require_run_folder(self._run)
            folder = level_folder(self._run.folder, level)
            path = save(
                folder,
                step,
                parts,
                plan,
                self._run.spec,
                world,
                progress=progress,
                declared=self._run.declared,
            )
        except PacelineError as error:
            if plan.checkpoint.on_error == "stop":
                raise
            self._told.append(LostSaveRecord(step=step, level=level, why=str(error)))
            return
        copies = agreed(world, lambda: list(self._levels.fill()) if world.is_first else [])[0]
        time_s = time.perf_counter() - start_s
        record = SaveRecord(
            step=step,
            path=str(path),
            level=level,
            time_s=time_s,
            stall_s=0.0,
            write_s=time_s - sum(c.write_s for c in copies if isinstance(c, SaveRecord)),
            size_bytes=read_manifest(path).size_bytes,
        )
        self._told += [record, *copies]

    def fence(self, *, is_due: bool = False) -> None:
        pass

    def poll(self) -> list[Told]:
        told, self._told = self._told, []
        return told

    def finish(self) -> list[Told]:
        if self._run.world.is_first:
            self._levels.drop_memory()
        return self.poll()

    def close(self) -> None:
        pass


def build(run: SavedRun, _parts: NamedParts) -> BlockingSaver:
    """A saver of a run."""
    return BlockingSaver(run)
