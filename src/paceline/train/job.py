"""A job: a run to start, or to go on with, and how its ranks do it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paceline.checkpoint.manifest import complete_checkpoints, newest_checkpoint, read_manifest
from paceline.core.env import rank_environment
from paceline.core.errors import UsageError
from paceline.data.sources import parse_source
from paceline.dist.world import open_world
from paceline.kernels.device import choose_device
from paceline.models.hub import KNOWN, ModelSource
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
        checkpoint: where the run goes on from; None starts it.
    """

    config: RunConfig
    plan: Plan
    folder: RunFolder
    checkpoint: Path | None = None


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


def resumed_job(path: Path, steps: int | None = None) -> Job:
    """A run to go on with from its newest complete checkpoint, or from the one that is named.

    Args:
        path: a run folder, or a checkpoint in one.
        steps: of the whole run, if they are to change.

    Raises:
        UsageError: no checkpoint there, or no step left to take.
    """
    checkpoint = newest_checkpoint(path)
    folder = RunFolder(checkpoint.resolve().parent.parent)
    config, plan = folder.read()
    config = replace(config, steps=steps or config.steps)
    if (done := read_manifest(checkpoint).step) >= config.steps:
        hint = f"--steps with more than {done} to train on"
        raise UsageError(f"{checkpoint} is at step {done} of {config.steps}: done", hint=hint)
    return Job(config, plan, folder, checkpoint)


def way_out(folder: RunFolder) -> str:
    """How a run that has failed goes on."""
    if complete := complete_checkpoints(folder.checkpoints):
        step = read_manifest(complete[-1]).step
        return f"paceline train --resume {folder.path} goes on from step {step}"
    return "no checkpoint is complete yet (checkpoint.interval_steps): begin anew, in another --out"


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
    with open_world(job.plan.mesh, device) as world, ExitStack() as stack:
        if world.is_first:
            stack.enter_context(job.folder.held())
        trainer = Trainer(source, job.config, job.plan, world, job.folder)
        if job.checkpoint is None and world.is_first:  # not before the data has been found sound
            job.folder.start(trainer.config, job.plan, source.files)
        world.barrier()
        if job.checkpoint is not None:
            trainer.restore(job.checkpoint)
        record = trainer.run()
        return _final(record, trainer.evaluation) if world.is_first and record else None


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
