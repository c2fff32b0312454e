"""A job: a run to start, or to go on with, and how its ranks do it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from paceline.checkpoint.levels import candidates, level_folder
from paceline.checkpoint.manifest import is_checkpoint, read_manifest
from paceline.checkpoint.newest import newest_whole
from paceline.checkpoint.set_aside import set_aside_after
from paceline.core.env import rank_environment
from paceline.core.errors import UsageError
from paceline.data.sources import parse_source
from paceline.dist.launch import is_spoken_for
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

    @property
    def step(self) -> int:
        """The last step that has been taken and saved."""
        return 0 if self.checkpoint is None else read_manifest(self.checkpoint).step


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
    return Job(config, _rooted(plan), folder)


def resumed_job(
    path: Path, steps: int | None = None, plan: Plan | None = None, checkpoint: Path | None = None
) -> Job:
    """A run to go on with from its newest complete checkpoint, or from the one that is named.

    A run that has saved nothing yet begins anew, in its folder.

    Args:
        path: a run folder, or a checkpoint in one.
        steps: of the whole run, if they are to change.
        plan: the run's from now on, if it is to change.
        checkpoint: of the run, wherever it lies; by default what `path` means.

    Raises:
        UsageError: no run there, or no step left to take.
        ConfigError: what must stay as it is would change.
    """
    if is_checkpoint(path):
        path, checkpoint = path.resolve().parent.parent, checkpoint or path
    folder = RunFolder(path)
    if not folder.is_begun:
        hint = "give a run folder, or a checkpoints/step-N of one"
        raise UsageError(f"{path} holds no run: it has no run.toml", hint=hint)
    config, before = folder.read()
    if checkpoint is None:
        found = candidates(path, before.checkpoint.levels)
        checkpoint = found[0].path if found else None
    config = replace(config, steps=steps or config.steps)
    job = Job(config, before, folder, checkpoint, is_begun=True)
    if job.step >= config.steps:
        hint = f"--steps with more than {job.step} to train on"
        raise UsageError(f"{checkpoint} is at step {job.step} of {config.steps}: done", hint=hint)
    return job if plan is None else replanned(job, plan)


def whole_job(job: Job, on_damaged: Callable[[Path, str], None]) -> Job:
    """A job that goes on from the newest checkpoint that is whole, or anew where there is none.

    Args:
        job: its folder may hold the run, or not yet.
        on_damaged: is told of each checkpoint that is passed over, and why.

    Raises:
        DataError: none of the run's checkpoints is whole.
    """
    if not job.folder.is_begun:
        return job
    levels = job.folder.read()[1].checkpoint.levels  # those that have been written so far
    checkpoint = newest_whole(candidates(job.folder.path, levels), on_damaged)
    return replace(job, checkpoint=checkpoint, is_begun=True)


def replanned(job: Job, plan: Plan, source: str = "the plan") -> Job:
    """A resumed job under another plan.

    Raises:
        ConfigError: what must stay as it is would change.
    """
    require_resumable(job.plan, plan, source=source)
    return replace(job, plan=_rooted(plan))


def require_launcher(plan: Plan) -> None:
    """Raises UsageError if ranks are to be started again that `paceline train` has not started."""
    if (wanted := plan.resilience.on_failure) != "stop" and not is_spoken_for():
        raise UsageError(
            f"resilience.on_failure = {wanted} is for ranks that paceline train has started, and "
            "can start again",
            hint='run paceline train without torchrun, or set resilience.on_failure = "stop"',
        )


def way_out(folder: RunFolder) -> str:
    """How a run that has failed goes on."""
    if not folder.is_begun:
        return "the run has not begun: once that is mended, give the same command again"
    if found := candidates(folder.path, folder.read()[1].checkpoint.levels):
        return f"paceline train --resume {folder.path} goes on from step {found[0].step}"
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
    with open_world(job.plan.mesh, device, watched=watched) as world, ExitStack() as stack:
        trainer = Trainer(source, job.config, job.plan, world, job.folder)
        if job.checkpoint is not None:
            trainer.restore(job.checkpoint)
        if world.is_first:  # not before the data and the checkpoint have been found sound
            stack.enter_context(job.folder.held())
            _write_down(replace(job, config=trainer.config), source, trainer.state.step)
        world.barrier()
        record = trainer.run()
        return _final(record, trainer.evaluation) if world.is_first and record else None


def _write_down(job: Job, source: ModelSource, step: int) -> None:
    """Writes into the run's folder what the run is, and puts aside what it goes back behind."""
    if not job.is_begun:
        job.folder.start(job.config, job.plan, source.files)
        return
    levels = dict.fromkeys((*job.folder.read()[1].checkpoint.levels, *job.plan.checkpoint.levels))
    for level in levels:
        if aside := set_aside_after(level_folder(job.folder.path, level), step):
            moved = ", ".join(path.name for path in aside)
            text = f"goes back to step {step}: later checkpoints are put aside, as {moved}"
            print(text, file=sys.stderr, flush=True)  # noqa: T201
    job.folder.go_on(job.config, job.plan, step)


def _final(record: StepRecord, evaluation: EvalRecord | None) -> StepRecord:
    """The last step's record, with what its evaluation gave."""
    if evaluation is None:
        return record
    return FinalRecord(
        **asdict(record), eval_loss=evaluation.loss, eval_perplexity=evaluation.perplexity
    )


def _rooted(plan: Plan) -> Plan:
    """The plan with absolute paths, so that it means the same in any folder."""
    paths = tuple(_absolute(path) for path in plan.resilience.shrink_plans)
    return replace(plan, resilience=replace(plan.resilience, shrink_plans=paths))


def _absolute(name: str) -> str:
    """A path such that a run can be resumed from any folder; other names as they are.

    A known model stays one, even beside a folder of its name, as everywhere else.
    """
    path = Path(name)
    return str(path.resolve()) if name not in KNOWN and path.exists() else name
