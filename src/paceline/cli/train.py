"""``paceline train``: from a MODEL and a SRC to checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import (
    Device,
    Dtype,
    Json,
    PlanFile,
    Settings,
    print_json,
    read_plan,
    require_dtype,
    say_warnings,
)
from paceline.core.env import rank_environment
from paceline.core.errors import RankError, UsageError

if TYPE_CHECKING:
    from paceline.plan.plan import Plan
    from paceline.train.job import Job

DEFAULT_STEPS = 100


def train(
    model: Annotated[str | None, typer.Argument(help="What to train.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text, JSONL, Parquet, a folder of such, or builtin:python-stdlib; "
            "repeated, each as SRC=WEIGHT: a mixture, by share of rows."
        ),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Held-out data, as --data.")] = None,
    plan_file: PlanFile = None,
    steps: Annotated[
        int | None, typer.Option(help=f"Steps of the whole run; {DEFAULT_STEPS}.", min=1)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A new run folder.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks to start; the plan's.", min=1)] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder, or a checkpoint in it.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint of --resume, wherever it lies.")
    ] = None,
    settings: Settings = None,
    dtype: Dtype = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a model, or resume a run from its newest complete checkpoint.

    A resumed run goes on under its own plan, changed by --set, or under that of --plan.
    Starts the plan's ranks on this machine; on several, run it under `torchrun --nnodes`.
    """
    from paceline.dist.launch import follow_launcher, is_launched

    if is_launched():
        follow_launcher()  # before the imports below, which take seconds
    from paceline.checkpoint.manifest import is_checkpoint
    from paceline.cli.supervised import needs_launcher, run_supervised, sound
    from paceline.kernels.device import choose_device, keep_freed_memory
    from paceline.models.hub import resolve
    from paceline.plan.check import require, warnings
    from paceline.train.inputs import open_inputs, require_sources
    from paceline.train.job import replanned, require_launcher, resumed_job, run_job, way_out

    require_dtype(dtype)
    if resume is not None:
        given = {"MODEL": model, "--data": data, "--eval-data": eval_data, "--out": out}
        _refuse_with_resume(given)
        job = resumed_job(resume, steps, checkpoint=checkpoint)
        plan = _plan(plan_file, settings, dtype, job.plan)
        job = replanned(job, plan, source=str(plan_file or "--set"))
    else:
        _refuse_without_resume(checkpoint)
        plan = _plan(plan_file, settings, dtype)
        job = _new_job(model, data, out, plan, steps=steps, eval_data=eval_data)
    require_sources(job.config)
    source = resolve(job.config.model, seed=job.plan.train.seed)
    num_ranks = None if is_launched() else nproc
    require(job.plan, source.spec, num_ranks=num_ranks, source=str(plan_file or "the plan"))
    choose_device(device)
    if is_launched():
        require_launcher(job.plan)
    elif resume is not None and checkpoint is None and not is_checkpoint(resume):
        job = sound(job)
    if needs_launcher(job.plan) and not is_launched():
        # Here, for however long it takes: ranks would wait for each other no more than minutes.
        open_inputs(job.config, job.plan, source)
        try:
            run_supervised(job, source.spec, new=sys.argv[1:], common=_common(device, as_json))
        except RankError as error:
            error.hint = error.hint or way_out(job.folder)
            raise
        return
    if (environment := rank_environment()) is None or environment.rank == 0:
        say_warnings(warnings(job.plan, source.spec))
    keep_freed_memory()  # this process is the run's alone
    record = run_job(job, source, device)
    if as_json and record is not None:
        print_json(record.to_dict())


def _common(device: str, as_json: bool) -> list[str]:
    """Flags that hold for a run however often it is started."""
    return ["--device", device, *(["--json"] if as_json else [])]


def _plan(
    file: Path | None, settings: list[str] | None, dtype: str | None, base: Plan | None = None
) -> Plan:
    plan = read_plan(file, settings, base)
    return plan.with_overrides([f'precision.compute="{dtype}"']) if dtype else plan


def _refuse_with_resume(given: dict[str, object]) -> None:
    if names := [name for name, value in given.items() if value]:
        hint = "a resumed run goes on with its model and data; --plan and --set say how"
        raise UsageError(f"--resume does not go with {', '.join(names)}", hint=hint)


def _refuse_without_resume(checkpoint: Path | None) -> None:
    if checkpoint is not None:
        hint = "paceline train --resume DIR --from CHECKPOINT"
        raise UsageError(f"--from {checkpoint} names a checkpoint of no run", hint=hint)


def _new_job(
    model: str | None,
    data: list[str] | None,
    out: Path | None,
    plan: Plan,
    *,
    steps: int | None,
    eval_data: str | None,
) -> Job:
    from paceline.dist.launch import is_launched
    from paceline.train.job import new_job
    from paceline.train.run import RunConfig, RunFolder

    if model is None or not data or out is None:
        hint = "paceline train MODEL --data SRC --out DIR, or paceline train --resume DIR"
        raise UsageError("train needs MODEL, --data and --out", hint=hint)
    folder = RunFolder(out)
    if not is_launched():  # ranks come after the first of them has written the folder
        folder.require_new()
    config = RunConfig(
        model=model, data=tuple(data), steps=steps or DEFAULT_STEPS, eval_data=eval_data
    )
    return new_job(config, plan, folder)
