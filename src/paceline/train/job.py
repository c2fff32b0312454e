"""A job: a run to start, or to go on with, and how its ranks do it."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paceline.checkpoint.manifest import complete_checkpoints, newest_checkpoint, read_manifest
from paceline.checkpoint.set_aside import set_aside_after
from paceline.core.env import rank_environment
from paceline.core.errors import UsageError
from paceline.data.sources import parse_source
from paceline.dist.world import open_world
from paceline.kernels.device import choose_device
from paceline.models.hub import KNOWN, ModelSource
from paceline.plan.check import require_resumable
from paceline.plan.plan import Plan
from paceline.train.records import EvalRecord, FinalRecord, StepRecord
from paceline.train.run import RunConfig, RunFolder
from paceline.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Job:
    """A run to start, or to go on with from a checkpoint.

    Attributes:
        config: what is trained, on what, for how long.
        plan: how.
        folder: the run's folder.
        checkpoint: where the run goes on from; None starts it at the first step.
        is_begun: whether the folder holds the run already.
    """

    config: RunConfig
    plan: Plan
    folder: RunFolder
    checkpoint: Path | None = None
    is_begun: bool = False


def new_job(config: RunConfig, plan: Plan, folder: RunFolder) -> Job:
    """A run to start; paths in its config are made absolute, so that any folder can resume it."""
    weighted = [parse_source(text) for text in config.sources]
    sources = [(_absolute(source), weight) for source, weight in weighted]
    config = replace(
        config,
        model=_absolute(config.model),
        # The weight is written even where it is 1: paths may hold the sign that it follows.
        data=tuple(f"{source}={weight}" for source, weight in sources)
        if len(sources) > 1
        else sources[0][0],
        eval_data=config.eval_data and _absolute(config.eval_data),
    )
    return Job(config, plan, folder)


def resumed_job(path: Path, steps: int | None = None, plan: Plan | None = None) -> Job:
    """A run to go on with from its newest complete checkpoint, or from the one that is named.

    A run that has saved nothing yet begins anew, in its folder.

    Args:
        path: a run folder, or a checkpoint in one.
        steps: of the whole run, if they are to change.
        plan: the run's from now on, if it is to change.

    Raises:
        UsageError: no run there, or no step left to take.
        ConfigError: what must stay as it is would change.
    """
    checkpoint = None if _has_saved_nothing(path) else newest_checkpoint(path)
    folder = RunFolder(path if checkpoint is None else checkpoint.resolve().parent.parent)
    config, before = folder.read()
    config = replace(config, steps=steps or config.steps)
    done = 0 if checkpoint is None else read_manifest(checkpoint).step
    if done >= config.steps:
        hint = f"--steps with more than {done} to train on"
        raise UsageError(f"{checkpoint} is at step {done} of {config.steps}: done", hint=hint)
    job = Job(config, before, folder, checkpoint, is_begun=True)
    return job if plan is None else replanned(job, plan)


def replanned(job: Job, plan: Plan, source: str = "the plan") -> Job:
    """A resumed job under another plan.

    Raises:
        ConfigError: what must stay as it is would change.
    """
    require_resumable(job.plan, plan, source=source)
    return replace(job, plan=plan)


def way_out(folder: RunFolder) -> str:
    """How a run that has failed goes on."""
    if not folder.is_begun:
        return "the run has not begun: once that is mended, give the same command again"
    if complete := complete_checkpoints(folder.checkpoints):
        step = read_manifest(complete[-1]).step
        return f"paceline train --resume {folder.path} goes on from step {step}"
    nothing = "no checkpoint is complete yet (checkpoint.interval_steps)"
    return f"paceline train --resume {folder.path} begins anew: {nothing}"


def run_job(job: Job, source: ModelSource, device_name: str = "auto") -> StepRecord | None:
    """Joins the ranks and trains.

    Args:
        job: its plan has been checked.
        source: its model.
        device_name: auto, cpu or cuda.

    Returns:
        The last step's record, on the first rank.
    """
    environment = rank_environment()
    device = choose_device(device_name, local_rank=environment.local_rank if environment else 0)
    watched = job.folder.path if job.plan.resilience.watch else None
    with open_world(job.plan.mesh, device, watched=watched) as world:
        trainer = Trainer(source, job.config, job.plan, world, job.folder)
        if job.checkpoint is not None:
            trainer.restore(job.checkpoint)
        if world.is_first:  # not before the data and the checkpoint have been found sound
            _write_down(replace(job, config=trainer.config), source, trainer.state.step)
        world.barrier()
        record = trainer.run()
        return _final(record, trainer.evaluation) if world.is_first and record else None


def _write_down(job: Job, source: ModelSource, step: int) -> None:
    """Writes into the run's folder what the run is, and puts aside what it goes back behind."""
    if not job.is_begun:
        job.folder.start(job.config, job.plan, source.files)
        return
    if aside := set_aside_after(job.folder.checkpoints, step):
        moved = ", ".join(path.name for path in aside)
        text = f"goes back to step {step}: later checkpoints are put aside, as {moved}"
        print(text, file=sys.stderr, flush=True)  # noqa: T201
    job.folder.go_on(job.config, job.plan, step)


def _has_saved_nothing(path: Path) -> bool:
    """Whether a path is a run's folder without a complete checkpoint."""
    folder = RunFolder(path)
    return folder.is_begun and not complete_checkpoints(folder.checkpoints)


def _final(record: StepRecord, evaluation: EvalRecord | None) -> StepRecord:
    """The last step's record, with what its evaluation gave."""
    if evaluation is None:
        return record
    return FinalRecord(
        **asdict(record), eval_loss=evaluation.loss, eval_perplexity=evaluation.perplexity
    )


def _absolute(name: str) -> str:
    """A path such that a run can be resumed from any folder; other names as they are.

    A known model stays one, even beside a folder of its name, as everywhere else.
    """
    path = Path(name)
    return str(path.resolve()) if name not in KNOWN and path.exists() else name
