"""A run's ranks under a supervisor, which starts them again as the plan says."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from paceline.core.clock import WallClock
from paceline.core.record import Record, RecordWriter
from paceline.dist.launch import launch_ranks
from paceline.plan.check import require, require_resumable
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.plan.shrink import first_fitting, shrink
from paceline.resilience.records import DamagedRecord
from paceline.resilience.run_watched import run_watched
from paceline.resilience.supervise import Means, supervise
from paceline.train.job import Job, whole_job
from paceline.train.logged import LoggedSteps


def run_supervised(job: Job, spec: ModelSpec, new: Sequence[str], common: Sequence[str]) -> None:
    """Runs the ranks of a job to its end.

    Args:
        job: its plan has been checked.
        spec: of its model.
        new: the arguments of the command that begins it.
        common: those of the command that goes on with it, beside what the job says.

    Raises:
        RankError: the ranks have failed, and are not started again.
    """
    smaller = smaller_plans(job.plan, spec)
    progress = LoggedSteps(job.folder)
    with tempfile.TemporaryDirectory(prefix="paceline-") as scratch, closing(_Log(job)) as log:
        plan_file = Path(scratch) / "plan.toml"
        arguments = partial(_arguments, new=new, common=common, plan_file=plan_file)
        means: Means[Job] = Means(
            launch=partial(_launch, arguments=arguments, log=log),
            again=partial(_again, progress=progress, on_damaged=log.damaged),
            shrink=partial(_shrunk, smaller=smaller),
            progress=progress,
            record=log.write,
            say=say,
            clock=WallClock(),
        )
        supervise(job, means)


def needs_launcher(plan: Plan) -> bool:
    """Whether a run's ranks are processes of their own: several, or one that is started again."""
    return plan.mesh.num_ranks > 1 or plan.resilience.on_failure != "stop"


def sound(job: Job) -> Job:
    """A job that goes on from the newest checkpoint that is whole; tells of those that are not.

    Raises:
        DataError: none is.
    """
    with closing(_Log(job)) as log:
        return whole_job(job, log.damaged)


def smaller_plans(plan: Plan, spec: ModelSpec) -> Callable[[int], Plan | None]:
    """What gives the plan for a number of ranks: the files that the plan names, or a rule.

    Raises:
        UsageError: a file that cannot be read.
        ConfigError: one with a plan that the run cannot go on under.
    """
    if not plan.resilience.shrink_plans:
        return partial(shrink, plan, spec)
    return partial(
        first_fitting, [_read(plan, spec, path) for path in plan.resilience.shrink_plans]
    )


def say(line: str) -> None:
    """Tells the person at the terminal."""
    print(line, file=sys.stderr, flush=True)


def _read(plan: Plan, spec: ModelSpec, path: str) -> Plan:
    """A smaller plan; how the run is saved and mended stays as it is."""
    smaller = Plan.from_toml(path)
    smaller = replace(smaller, checkpoint=plan.checkpoint, resilience=plan.resilience)
    require_resumable(plan, smaller, source=path)
    require(smaller, spec, source=path)
    return smaller


def _launch(job: Job, arguments: Callable[[Job], Sequence[str]], log: _Log) -> None:
    launch = partial(launch_ranks, job.plan.mesh, arguments(job))
    if job.plan.resilience.watch:
        run_watched(launch, job.folder.path, job.plan, record=log.write, say=say)
    else:
        launch()


def _arguments(
    job: Job, *, new: Sequence[str], common: Sequence[str], plan_file: Path
) -> Sequence[str]:
    """Of the command that begins a job's run, or goes on with it."""
    if not job.is_begun:
        return new
    plan_file.write_text(job.plan.to_toml(), encoding="utf-8")
    given = ["train", "--resume", str(job.folder.path), "--plan", str(plan_file)]
    given += ["--steps", str(job.config.steps)]
    given += ["--from", str(job.checkpoint)] if job.checkpoint else []
    return [*given, *common]


def _again(job: Job, progress: LoggedSteps, on_damaged: Callable[[Path, str], None]) -> Job:
    if job.checkpoint is not None and progress.last_step() is None:
        return job  # it may have been named, with others after it that are not yet put aside
    return whole_job(job, on_damaged)


def _shrunk(job: Job, num_ranks: int, smaller: Callable[[int], Plan | None]) -> Job | None:
    plan = smaller(num_ranks)
    return None if plan is None else replace(job, plan=plan)


class _Log:
    """What the supervisor writes down, once the run has a folder.

    Args:
        job: whose run it is.
    """

    def __init__(self, job: Job) -> None:
        self._path = job.folder.supervisor_records
        self._writer: RecordWriter | None = None

    def write(self, record: Record) -> None:
        self._writer = self._writer or RecordWriter(self._path)
        self._writer.write(record)

    def damaged(self, path: Path, why: str) -> None:
        """Tells of a checkpoint that is passed over."""
        say(f"{why}: passed over")
        self.write(DamagedRecord(path=str(path), why=why))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
