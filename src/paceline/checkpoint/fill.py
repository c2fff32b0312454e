"""The levels after the first: filled with checked copies of what is complete on the first."""

from __future__ import annotations

import hashlib
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from paceline.checkpoint.base import LostSaveRecord, SavedRun, SaveRecord, Told
from paceline.checkpoint.commit import commit, drop_old, open_unfinished, unfinished
from paceline.checkpoint.levels import MEMORY, level_folder, memory_folder
from paceline.checkpoint.manifest import MANIFEST, complete_checkpoints, read_manifest, step_of
from paceline.checkpoint.save import not_written
from paceline.core.errors import DataError, PacelineError
from paceline.core.files import sync_file, write_text

_CHUNK_BYTES = 1 << 22


class SlowerLevels:
    """Fills the levels after the first; the first rank's work.

    Args:
        run: whose checkpoints they are.
    """

    def __init__(self, run: SavedRun) -> None:
        self._run = run
        self._config = run.plan.checkpoint
        self._first, *self._others = (
            level_folder(run.folder, level) for level in self._config.levels
        )
        self._lock = threading.Lock()
        self._read: set[Path] = set()

    def drop_old(self) -> None:
        """Removes the checkpoints of the first level that are not to be kept or being copied."""
        with self._lock:
            drop_old(self._first, self._config, self._read)

    def fill(self) -> Iterator[Told]:
        """Copies the newest complete checkpoint to every level that lacks it.

        Those that are overtaken meanwhile are never copied.

        Raises:
            PacelineError: a level cannot be written, and the plan says to stop.
            DataError: a file has changed since it was written.
        """
        for level, folder in zip(self._config.levels[1:], self._others, strict=True):
            source = self._begin_to_read()
            if source is None or _has(folder, source.name):
                continue
            try:
                yield self._copy(source, folder, level)
            except PacelineError as error:
                if self._config.on_error == "stop":
                    raise
                step = step_of(source)
                shutil.rmtree(unfinished(folder, step), ignore_errors=True)
                yield LostSaveRecord(step=step, level=level, why=str(error))
            finally:
                self._read.clear()

    def drop_memory(self) -> None:
        """Removes what the run keeps in memory, as it ends well, unless it is nowhere else."""
        if MEMORY in self._config.levels and len(self._config.levels) > 1:
            shutil.rmtree(memory_folder(self._run.folder), ignore_errors=True)

    def _begin_to_read(self) -> Path | None:
        with self._lock:
            newest = complete_checkpoints(self._first)[-1:]
            self._read = set(newest)
        return newest[0] if newest else None

    def _copy(self, source: Path, folder: Path, level: str) -> SaveRecord:
        start_s = time.perf_counter()
        path = copy_checkpoint(source, folder)
        drop_old(folder, self._config)
        manifest = read_manifest(path)
        return SaveRecord(
            step=manifest.step,
            path=str(path),
            level=level,
            time_s=0.0,
            stall_s=0.0,
            write_s=time.perf_counter() - start_s,
            size_bytes=manifest.size_bytes,
        )


class Filler:
    """The first rank's thread that fills the slower levels.

    Args:
        levels: that it fills.
    """

    def __init__(self, levels: SlowerLevels) -> None:
        self._levels = levels
        self._told: queue.SimpleQueue[Told] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._due: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="save: levels", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """A checkpoint is complete on the first level."""
        self._due.put(True)

    def poll(self) -> list[Told]:
        """What has become of copies.

        Raises:
            PacelineError: one has failed, and the plan says to stop.
        """
        if self._error is not None:
            raise self._error
        return [self._told.get() for _ in range(self._told.qsize())]

    def finish(self) -> list[Told]:
        """Waits until all levels are filled."""
        self.close()
        return self.poll()

    def close(self) -> None:
        """Ends the thread after what is due."""
        if self._thread.is_alive():
            self._due.put(False)
            self._thread.join()

    def _work(self) -> None:
        try:
            while self._due.get():
                for told in self._levels.fill():
                    self._told.put(told)
        except Exception as error:
            self._error = error


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """Copies a complete checkpoint into another folder of checkpoints, whole or not at all.

    Raises:
        PacelineError: the copy cannot be written.
        DataError: a file has changed since it was written; it is named.
    """
    manifest = read_manifest(source)
    try:
        path = open_unfinished(folder, manifest.step)
        for name, entry in manifest.files.items():
            if _copy_file(source / name, path / name) != entry.sha256:
                raise DataError(f"{source / name} is damaged: its checksum has changed")
        write_text(path / MANIFEST, (source / MANIFEST).read_text(encoding="utf-8"))
        return commit(folder, manifest.step)
    except OSError as error:
        raise not_written(folder / source.name, error) from error


def _copy_file(source: Path, target: Path) -> str:
    """Copies a file to disk and returns its SHA-256, in one reading."""
    digest = hashlib.sha256()
    with source.open("rb") as from_file, target.open("wb") as to_file:
        while chunk := from_file.read(_CHUNK_BYTES):
            digest.update(chunk)
            to_file.write(chunk)
    sync_file(target)
    return digest.hexdigest()


def _has(folder: Path, name: str) -> bool:
    return (folder / name / MANIFEST).exists()
