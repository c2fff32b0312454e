"""``paceline.Trainer``: a training run as an object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.core.env import rank_environment
from paceline.kernels.device import choose_device
from paceline.models.hub import resolve
from paceline.plan.check import require
from paceline.plan.plan import Plan
from paceline.train.inputs import require_sources
from paceline.train.job import Job, new_job, require_launcher, resumed_job, run_job
from paceline.train.records import StepRecord
from paceline.train.run import RunConfig, RunFolder


class Trainer:
    """A training run, as ``paceline train`` does it: in this process, or on every rank that
    ``torchrun`` has started.

    Args:
        model: a MODEL.
        data: a SRC: text, JSONL or Parquet files, a folder of such, or ``builtin:python-stdlib``;
            or several, each ``SRC=WEIGHT``: a mixture, by share of rows.
        out: a new run folder.
        eval_data: a SRC of data that is held out.
        plan: how; by default one rank and the plan's defaults.
        steps: optimizer steps of the whole run.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: the plan has problems, the number of ranks included.
        UsageError: no such model or data, or a folder that holds a run already.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        data: str | Path | Sequence[str],
        out: str | Path,
        eval_data: str | Path | None = None,
        plan: Plan | None = None,
        steps: int = 100,
        device: str = "auto",
    ) -> None:
        folder = RunFolder(Path(out))
        if rank_environment() is None:  # ranks may come after the first has written the folder
            folder.require_new()
        config = RunConfig(
            model=str(model),
            data=str(data) if isinstance(data, str | Path) else tuple(data),
            steps=steps,
            eval_data=None if eval_data is None else str(eval_data),
        )
        self._open(new_job(config, plan or Plan(), folder), device)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        plan: Plan | None = None,
        steps: int | None = None,
        device: str = "auto",
    ) -> Trainer:
        """A run to go on with.

        Args:
            path: a run folder, for its newest complete checkpoint; or a checkpoint in one.
            plan: how the run goes on, if otherwise than before.
            steps: of the whole run, if they are to change.
            device: auto, cpu or cuda.

        Raises:
            UsageError: no run there, or no step left to take.
            ConfigError: the plan has problems, or changes what a run stands on.
        """
        trainer = cls.__new__(cls)
        trainer._open(resumed_job(Path(path), steps, plan), device)
        return trainer

    def _open(self, job: Job, device: str) -> None:
        """Checks all that can be checked before ranks meet."""
        require_launcher(job.plan)
        require_sources(job.config)
        self._source = resolve(job.config.model, seed=job.plan.train.seed)
        environment = rank_environment()
        num_ranks = environment.world_size if environment else 1
        require(job.plan, self._source.spec, num_ranks=num_ranks, source="the plan")
        choose_device(device)
        self._job, self._device = job, device

    @property
    def plan(self) -> Plan:
        """How the run is done."""
        return self._job.plan

    @property
    def folder(self) -> Path:
        """Where its records and checkpoints are."""
        return self._job.folder.path

    def run(self) -> StepRecord | None:
        """Takes the steps that are left, and saves at the end.

        Returns:
            The last step's record; None on ranks other than the first.
        """
        return run_job(self._job, self._source, self._device)
