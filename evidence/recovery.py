"""Proof: runs whose ranks are killed or stopped go on unattended, soon, and to the same losses.

Each layout has one run on four ranks, of which a random one is killed (SIGKILL) or stopped
(SIGSTOP), in turn, at seeded random moments, again and again. Nobody resumes anything: the
supervisor does. Every step that is logged must have the loss of one rank that is left alone. Each
fault leaves a record; started again, the proof goes on with the layouts that are not done.
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from paceline.core import rng
from paceline.core.errors import PacelineError
from paceline.core.record import Record, RecordWriter, read_records

LAYOUTS: dict[str, tuple[str, ...]] = {
    "dp_shard 4": ("mesh.dp_shard=4",),
    "tp 2 x dp_replicate 2": ("mesh.tp=2", "mesh.dp_replicate=2"),
    "pp 2 x dp_shard 2": ("mesh.pp=2", "mesh.dp_shard=2", "pipeline.num_microbatches=2"),
    "cp 2 x tp 2": ("mesh.cp=2", "mesh.tp=2"),
}
_SETTINGS = (
    "train.sequence_length=16",
    "train.tokens_per_step=128",
    "optimizer.schedule.kind=constant",
    "checkpoint.interval_steps=5",
    "checkpoint.keep=3",
    *(f"precision.{key}=float64" for key in ("params", "compute", "reduce")),
)
_SUPERVISED = ("resilience.on_failure=restart", "resilience.max_restarts=1000")
_SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
_LONGEST_S = 3.0
_LIMIT_S = 120.0
_MAX_ERROR = 1e-9  # of a loss: sums in another order, in float64


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultRecord(Record):
    """One fault.

    Attributes:
        layout: of the run.
        number: of the fault in it, from 1.
        signal: that a rank was sent.
        num_lost_steps: steps that were taken again.
        time_s: from the signal to the end of the next step.
    """

    kind: ClassVar[str] = "recovery"
    layout: str
    number: int
    signal: str
    num_lost_steps: int
    time_s: float


def prove(
    folder: Path, faults: int, layouts: Sequence[str] = tuple(LAYOUTS), seed: int = 0
) -> list[dict[str, Any]]:
    """Injects so many faults into a run of every layout.

    Raises:
        PacelineError: a run did not go on, or a loss is not what it must be.
    """
    found: list[dict[str, Any]] = []
    for place, layout in enumerate(layouts):
        path = folder / f"{layout.replace(' ', '-')}.jsonl"
        if not path.exists():
            run = folder / "run"
            shutil.rmtree(run, ignore_errors=True)
            records = list(_inject(run, layout, faults, seed=seed + 1000 * place))
            _compare(run, folder / "whole")
            writer = RecordWriter(path)
            for record in records:
                writer.write(record)
            writer.close()
        found += read_records(path)
    return found


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """How long recoveries took, in words."""
    times_s = [record["time_s"] for record in records]
    low, middle, high = min(times_s), statistics.median(times_s), max(times_s)
    return f"the next step was finished after {low:.1f} / {middle:.1f} / {high:.1f} s"


def _inject(run: Path, layout: str, faults: int, seed: int) -> Iterator[FaultRecord]:
    settings = (*_SUPERVISED, "resilience.watch=true", *LAYOUTS[layout])
    with _started(run, settings) as process:
        for number in range(1, faults + 1):
            draws = rng.uniform(2, seed=seed, purpose="fault", position=number)
            _wait_for_step(run, process)
            time.sleep(_LONGEST_S * float(draws[0]))
            ranks = _children(process.pid)
            number_of_signal = _SIGNALS[number % 2]
            os.kill(ranks[int(len(ranks) * float(draws[1]))], number_of_signal)
            start_s = time.monotonic()
            _wait_for(lambda n=number: len(_of(run, "recovered")) >= n, process)
            yield FaultRecord(
                layout=layout,
                number=number,
                signal=number_of_signal.name,
                num_lost_steps=_of(run, "restart")[-1]["num_lost_steps"],
                time_s=time.monotonic() - start_s,
            )


@contextmanager
def _started(run: Path, settings: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "paceline", *_arguments(run, 1_000_000, settings)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # its ranks end with it
        process.wait()


def _arguments(run: Path, steps: int, settings: Sequence[str]) -> list[str]:
    given = ["train", "random:llama:tiny", "--data", "builtin:python-stdlib", "--out", str(run)]
    given += ["--steps", str(steps)]
    return given + [part for key in (*_SETTINGS, *settings) for part in ("--set", key)]


def _wait_for_step(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits for a step beyond those that there are: a fault then hits a run that trains."""
    before = len(_losses(run))
    _wait_for(lambda: len(_losses(run)) > before, process)


def _wait_for(is_so: Any, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + _LIMIT_S
    while not is_so():
        if process.poll() is not None:
            raise PacelineError(f"the run ended by itself, with exit code {process.returncode}")
        if time.monotonic() > end_s:
            raise PacelineError(f"the run has not gone on for {_LIMIT_S:.0f} s")
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    """The processes that one has started."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _of(run: Path, kind: str) -> list[dict[str, Any]]:
    path = run / "records" / "supervisor.jsonl"
    return list(read_records(path, kind)) if path.exists() else []


def _losses(run: Path) -> list[tuple[int, float]]:
    path = run / "records" / "rank-0.jsonl"
    found = read_records(path, "step") if path.exists() else iter(())
    return [(record["step"], record["loss"]) for record in found]


def _compare(run: Path, whole: Path) -> None:
    """Every loss that was logged against those of one rank that is left alone for as long."""
    losses = _losses(run)
    steps = max(step for step, _ in losses)
    if len(expected := dict(_losses(whole))) < steps:
        shutil.rmtree(whole, ignore_errors=True)
        command = [sys.executable, "-m", "paceline", *_arguments(whole, steps, ())]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        expected = dict(_losses(whole))
    for step, loss in losses:
        if abs(loss - expected[step]) > _MAX_ERROR * expected[step]:
            raise PacelineError(f"step {step}: loss {loss}, uninterrupted {expected[step]}")
