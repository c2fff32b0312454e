"""Lazy asynchronous saves: the state is copied while the next step computes, and then written.

Source: Maurya et al., DataStates-LLM: Lazy Asynchronous Checkpointing for Large Language Models,
    arXiv:2406.10707, Sec. 4.
Replaces: blocking.  Needs: a state that nothing changes between two updates.  Forbids: none.
Cost: training stands still for max(0, size_bytes / copy_bytes_per_s - time of forward and
    backward), and for what is left of the save before; host memory of buffer_bytes.
Differs: torch's distributed checkpoint writes the files; a folder is renamed once all are on disk.

Parameters and optimizer state are what they are from one update to the next. So one thread copies
them into a buffer during the forward and backward pass, and the trainer waits for it, at the fence,
before it moves anything. A second thread writes the copies. No thread but the trainer's takes part
in a collective: who writes what is agreed once, before the first save; a rank whose files are on
disk leaves its account of them beside them; and the first rank, once it has all accounts, gives
the checkpoint its name.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from paceline.checkpoint.agree import agreed
from paceline.checkpoint.base import LostSaveRecord, SavedRun, SaveRecord, Told
from paceline.checkpoint.commit import open_unfinished, unfinished
from paceline.checkpoint.copies import fingerprints
from paceline.checkpoint.fill import Filler, SlowerLevels
from paceline.checkpoint.levels import level_folder, require_levels, require_run_folder
from paceline.checkpoint.manifest import Progress
from paceline.checkpoint.parts import PartsWriter
from paceline.checkpoint.save import not_written
from paceline.checkpoint.shares import Copies, SaveFiles, agree_on_layout
from paceline.checkpoint.staging import StagedTensors, Staging
from paceline.core.errors import PacelineError, RankError
from paceline.optim.parts import NamedParts, Part, named_parts

# How long a run that fails waits for the other ranks' files of a save that it has begun.
_PATIENCE_S = 5.0


class WriteEnd(NamedTuple):
    """What the first rank knows of a checkpoint that is complete.

    Attributes:
        write_s: since its begin.
        size_bytes: of its files.
    """

    write_s: float
    size_bytes: int


class LazySaver:
    """Saves in the background.

    Args:
        run: whose state it is.
        parts: of this rank.
    """

    def __init__(self, run: SavedRun, parts: NamedParts) -> None:
        require_levels(run)
        self._run, self._config = run, run.plan.checkpoint
        self._folder = level_folder(run.folder, self._config.levels[0])
        parts = named_parts(parts)
        self._layout = agree_on_layout(parts, run.world)
        live = PartsWriter(parts)
        sizes = [live.resolve_data(item).nbytes for item in self._layout.mine.items]
        self._staging = Staging(sizes, self._config.buffer_bytes, run.world.device)
        self._levels = SlowerLevels(run)
        self._filler = Filler(self._levels) if run.world.is_first else None
        self._write: _Write | None = None
        self._told: list[Told] = []
        self._settled_s = 0.0
        threading.Thread(target=self._staging.fault_in, daemon=True).start()

    def begin(self, step: int, parts: NamedParts, progress: Progress | None = None) -> None:
        self._settle()
        stall_s, self._settled_s = self._settled_s, 0.0
        start_s = time.perf_counter() - stall_s
        parts = named_parts(parts)
        live = PartsWriter(parts)
        assert live.create_local_plan().items == self._layout.local.items, "the layout has changed"
        sources = [live.resolve_data(item) for item in self._layout.mine.items]
        try:
            agreed(self._run.world, lambda: self._open(step))
        except (OSError, PacelineError) as error:
            self._lose(step, error)
            return
        staged = StagedTensors(self._staging, sources)
        files = SaveFiles(self._run, self._folder, step, self._layout, self._levels, progress)
        self._write = _Write(parts, staged, files, self._filler)
        self._write.stall_s = stall_s
        self._write.stood_s = time.perf_counter() - start_s

    def fence(self, *, is_due: bool = False) -> None:
        if self._write is not None:
            self._write.fence()
        if is_due:
            self._settle()

    def poll(self) -> list[Told]:
        write = self._write
        if write is not None and write.error is not None and self._ends_run(write.error):
            raise self._failure(write.step, write.error)
        # The other ranks learn that all is on disk when the next save begins.
        if write is not None and self._run.world.is_first and write.is_complete:
            self._tell(write, write.wait())
        if self._filler is not None:
            self._told += self._filler.poll()
        told, self._told = self._told, []
        return told

    def finish(self) -> list[Told]:
        self._settle()
        filler = self._filler
        self._told += agreed(self._run.world, lambda: filler.finish() if filler else [])[0]
        if filler is not None:
            self._levels.drop_memory()
        told, self._told = self._told, []
        return told

    def close(self) -> None:
        if self._write is not None:
            self._write.close(_PATIENCE_S)
        if self._filler is not None:
            self._filler.close()

    def _settle(self) -> None:
        """Waits for the save before, which is complete, or lost, on all ranks alike."""
        start_s = time.perf_counter()
        if self._write is not None:
            self._write.fence()
            self._wait(self._write)
        self._settled_s += time.perf_counter() - start_s

    def _wait(self, write: _Write) -> None:
        """Waits for a save that has been copied."""
        world = self._run.world
        try:
            agreed(world, write.wait_for_share)
        except Exception as error:  # the first rank need not wait for accounts that never come
            write.abandon(error)
            self._lose(write.step, error)
            return
        try:
            self._tell(write, agreed(world, write.wait)[0])
        except Exception as error:
            self._lose(write.step, error)
            return
        self._write = None

    def _open(self, step: int) -> None:
        """The first rank makes the folder that all write into."""
        require_run_folder(self._run)
        if self._run.world.is_first:
            open_unfinished(self._folder, step)

    def _tell(self, write: _Write, end: WriteEnd) -> None:
        if not write.is_told:
            self._told.append(write.record(end))
            write.is_told = True

    def _lose(self, step: int, error: Exception) -> None:
        """Ends the run for a save that has failed, or goes on without it."""
        self._write = None
        if self._run.world.is_first:
            shutil.rmtree(unfinished(self._folder, step), ignore_errors=True)
        failure = self._failure(step, error)
        if self._ends_run(error):
            raise failure from error
        level = self._config.levels[0]
        self._told.append(LostSaveRecord(step=step, level=level, why=str(failure.message)))

    def _ends_run(self, error: Exception) -> bool:
        """Whether a save that fails so ends the run: copies that differ are no matter of disks."""
        return self._config.on_error == "stop" or isinstance(error, RankError)

    def _failure(self, step: int, error: Exception) -> PacelineError:
        if isinstance(error, PacelineError):
            return error
        return not_written(self._folder / f"step-{step}", error)


class _Write:
    """A save between its begin and its end, and the two threads that it has.

    Args:
        parts: of this rank.
        staged: of these, what it writes.
        files: its files.
        filler: told when it is complete; the first rank has one.

    Attributes:
        step: that is saved.
        stall_s: that the trainer has waited for writers.
        stood_s: that training has stood still, `stall_s` among it.
        error: what it has failed of.
        is_told: whether the trainer knows that it is complete.
    """

    def __init__(
        self,
        parts: Sequence[tuple[str, Part]],
        staged: StagedTensors,
        files: SaveFiles,
        filler: Filler | None,
    ) -> None:
        self.step = files.step
        self.stall_s = self.stood_s = 0.0
        self.error: Exception | None = None
        self.is_told = False
        self._parts, self._staged, self._files, self._filler = parts, staged, files, filler
        self._copies: Copies = {}
        self._start_s = time.perf_counter()
        self._end = WriteEnd(0.0, 0)
        self._is_share_written = False
        self._has_share, self._is_over = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"save {self.step}: {name}", daemon=True)
            for name, work in (("copies", self._copy), ("writes", self._work))
        ]
        for thread in self._threads:
            thread.start()

    def fence(self) -> None:
        """Waits until the state has been copied."""
        if not self._staged.staged.is_set():
            start_s = time.perf_counter()
            self._staged.staged.wait()
            waited_s = time.perf_counter() - start_s
            self.stall_s += waited_s
            self.stood_s += waited_s

    def wait_for_share(self) -> None:
        """Waits until this rank's files are on disk; raises what they have failed of."""
        self._has_share.wait()
        if self.error is not None and not self._is_share_written:
            raise self.error

    @property
    def is_complete(self) -> bool:
        """Whether there is nothing left to wait for, and nothing has failed."""
        return self.error is None and not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> WriteEnd:
        """Waits until all that this rank does is done; raises what it has failed of."""
        for thread in self._threads:
            thread.join()
        if self.error is not None:
            raise self.error
        return self._end

    def abandon(self, error: Exception) -> None:
        """Ends its threads, for it will never be complete."""
        self._staged.abandon(error)
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def close(self, patience_s: float) -> None:
        """Lets it be completed, if the other ranks still can."""
        self._has_share.wait()
        self._threads[-1].join(patience_s)
        self.abandon(PacelineError("the run has ended"))

    def record(self, end: WriteEnd) -> SaveRecord:
        """What there is to tell.

        Args:
            end: what the first rank has given.
        """
        path = self._files.folder / f"step-{self.step}"
        return SaveRecord(
            step=self.step,
            path=str(path),
            level=self._files.run.plan.checkpoint.levels[0],
            time_s=self.stood_s,
            stall_s=self.stall_s,
            write_s=end.write_s,
            size_bytes=end.size_bytes,
        )

    def _copy(self) -> None:
        """Reads all that must not change until the fence; the work of a thread."""
        try:
            self._copies.update(fingerprints(self._parts, self._files.layout.copied))
        except Exception as error:
            self._staged.abandon(error)
        self._staged.stage()

    def _work(self) -> None:
        """Writes, and commits on the first rank; the work of a thread."""
        try:
            self._files.write_share(self._staged, self._copies)
            self._is_share_written = True
            self._has_share.set()
            if self._filler is not None:
                size_bytes = self._files.commit(self._is_over)
                self._end = WriteEnd(time.perf_counter() - self._start_s, size_bytes)
                self._filler.notify()
        except Exception as error:
            self.error = error
            self._staged.abandon(error)
        finally:
            self._has_share.set()


def build(run: SavedRun, parts: NamedParts) -> LazySaver:
    """A saver of a run."""
    return LazySaver(run, parts)
