"""Proof: a run killed again and again logs what an uninterrupted run logs, bit for bit.

One run that saves lazily at every step is killed at seeded random moments, in the middle of saves
among them, and resumed each time; so is one of two ranks. Every step that it logs must have the
loss of the uninterrupted run, and after every kill the newest complete checkpoint must be whole,
and no older than one step, the interval: before a step that is saved is taken, the save before is
complete.
Each kill leaves a record; started again, the proof goes on where it was.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from paceline.checkpoint.manifest import complete_checkpoints, read_manifest, verify_files
from paceline.core import rng
from paceline.core.errors import PacelineError, UsageError
from paceline.core.record import Record, RecordWriter, read_records
from paceline.train.run import RunFolder

_COMMON = ("--data", "builtin:python-stdlib", "--steps", "1000000")
_SETTINGS = (
    "train.sequence_length=32",
    "train.tokens_per_step=64",
    "optimizer.schedule.kind=constant",
    "checkpoint.interval_steps=1",
    "checkpoint.keep=3",
)
_LONGEST_S = 2.0
_MOST_LOST_STEPS = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class KillRecord(Record):
    """One kill.

    Attributes:
        number: of the kill, from 1.
        after_s: seconds between the first step of that start and the kill.
        resumed_from: step of the newest complete checkpoint afterwards.
        lost_steps: that had been logged after it.
        partial: whether an unfinished checkpoint lay beside it.
        ranks: of the run.
    """

    kind: ClassVar[str] = "kill"
    number: int
    after_s: float
    resumed_from: int
    lost_steps: int
    partial: bool
    ranks: int


def prove(folder: Path, kills: int, ranks: int = 1, seed: int = 0) -> list[dict[str, object]]:
    """Kills until there are `kills` records, then compares with an uninterrupted run.

    Args:
        folder: of the proof.
        kills: how many.
        ranks: of the run.
        seed: of the moments.

    Raises:
        PacelineError: a checkpoint or a loss is not what it must be.
    """
    run, records = folder / "run", folder / "kills.jsonl"
    done = len(list(read_records(records))) if records.exists() else 0
    writer = RecordWriter(records)
    for number in range(done + 1, kills + 1):
        draw = rng.uniform(1, seed=seed, purpose="kill moment", position=number)[0]
        after_s = _LONGEST_S * float(draw)
        _start_and_kill(run, after_s, ranks)
        newest = complete_checkpoints(run / "checkpoints")
        step = 0
        if newest:
            manifest = read_manifest(newest[-1])
            verify_files(newest[-1], manifest)
            step = manifest.step
        else:
            shutil.rmtree(run)  # killed before the first save: nothing was promised
        lost = max((logged for logged, _ in _losses(run)), default=step) - step
        if lost > _MOST_LOST_STEPS:
            raise PacelineError(f"kill {number}: {lost} steps after step {step} are lost")
        writer.write(
            KillRecord(
                number=number,
                after_s=after_s,
                resumed_from=step,
                lost_steps=max(0, lost),
                partial=any((run / "checkpoints").glob(".unfinished-*")),
                ranks=ranks,
            )
        )
    writer.close()
    _compare(run, folder / "uninterrupted", ranks)
    return list(read_records(records))


def _start_and_kill(run: Path, after_s: float, ranks: int) -> None:
    resumed = (run / "run.toml").exists()
    arguments = ("--resume", str(run)) if resumed else _arguments(run, ranks)
    process = subprocess.Popen(
        [sys.executable, "-m", "paceline", "train", *arguments], stderr=subprocess.DEVNULL
    )
    before = len(_losses(run))
    while len(_losses(run)) == before:
        if process.poll() is not None:
            raise PacelineError(f"the run ended by itself, with exit code {process.returncode}")
        time.sleep(0.01)
    time.sleep(after_s)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_free(run)


def _wait_until_free(run: Path) -> None:
    """Waits for ranks that have just lost their launcher, which they follow."""
    while True:
        try:
            with RunFolder(run).held():
                return
        except UsageError:
            time.sleep(0.05)


def _arguments(run: Path, ranks: int) -> tuple[str, ...]:
    settings = (*_SETTINGS, f"mesh.dp_replicate={ranks}")
    options = [part for setting in settings for part in ("--set", setting)]
    return ("random:llama:tiny", *_COMMON, "--out", str(run), *options)


def _compare(run: Path, uninterrupted: Path, ranks: int) -> None:
    """Every loss of the killed run against those of one that is left alone for as long."""
    losses = _losses(run)
    steps = max(step for step, _ in losses)
    shutil.rmtree(uninterrupted, ignore_errors=True)
    settings = (*_arguments(uninterrupted, ranks), "--set", f"checkpoint.interval_steps={steps}")
    command = [sys.executable, "-m", "paceline", "train", *settings, "--steps", str(steps)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    expected = dict(_losses(uninterrupted))
    for step, loss in losses:
        if loss != expected[step]:
            raise PacelineError(f"step {step}: loss {loss}, uninterrupted {expected[step]}")


def _losses(run: Path) -> list[tuple[int, float]]:
    path = run / "records" / "rank-0.jsonl"
    found: Iterator[dict[str, object]] = read_records(path, "step") if path.exists() else iter(())
    return [(int(str(r["step"])), float(str(r["loss"]))) for r in found]
