"""The run folder: what a run is, so that it can be resumed and exported by its path alone.

plan.toml                  the plan, every key written out
plan-until-step-N.toml     the plan before, of a run that has gone on under another from step N
run.toml                   model, data (and a hash of its tokens) and number of steps
model/                     the model's small files: config, tokenizer
records/rank-*.jsonl       what happened
records/supervisor.jsonl   what was done about it, where ranks have failed
checkpoints/step-N/        complete when manifest.json is there
watch/rank-*.ring          the times of the last collectives, of a run that is watched
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from paceline.core.config import Config
from paceline.core.errors import UsageError
from paceline.core.files import held, write_text
from paceline.models.hf import SMALL_FILES
from paceline.plan.plan import Plan

_LOCK = ".writer"  # beside run.toml, which says whether there is a run


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Config):
    """What a run trains, on what, for how long.

    Attributes:
        model: a MODEL argument.
        data: a SRC argument, or several, each ``SRC=WEIGHT``.
        steps: optimizer steps of the whole run.
        eval_data: a SRC argument, of data that is held out.
        model_identity: what tells the model's weights from others; empty before the run has begun.
        data_identity: hashes of the tokens of each source, of the held-out one last; none before
            the run has begun.
    """

    model: str
    data: str | tuple[str, ...]
    steps: int
    eval_data: str | None = None
    model_identity: str = ""
    data_identity: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """`data` as a list, whatever the number of sources."""
        return (self.data,) if isinstance(self.data, str) else self.data


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def records(self, rank: int) -> Path:
        return self.path / "records" / f"rank-{rank}.jsonl"

    @property
    def supervisor_records(self) -> Path:
        """What was done about ranks that failed."""
        return self.path / "records" / "supervisor.jsonl"

    def start(self, config: RunConfig, plan: Plan, model_files: dict[str, str]) -> None:
        """Writes what the run is.

        Raises:
            UsageError: the folder holds a run already.
        """
        self.require_new()
        for name, text in model_files.items():
            write_text(self.path / "model" / name, text)
        write_text(self.path / "plan.toml", plan.to_toml())
        write_text(self.path / "run.toml", config.to_toml())

    def held(self) -> AbstractContextManager[None]:
        """Keeps other processes from writing to the run while this one does.

        Raises:
            UsageError: another does; it is named.
        """
        return held(self.path / _LOCK, f"the run in {self.path}")

    def go_on(self, config: RunConfig, plan: Plan, step: int) -> None:
        """Writes what the run is from now on; keeps the plan that was in force before.

        Args:
            config: as it is now.
            plan: likewise.
            step: the last one taken before.
        """
        before = self.read()
        former = self.path / f"plan-until-step-{step}.toml"
        if plan != before[1] and not former.exists():  # of several goes from a step, the first
            write_text(former, before[1].to_toml())
        if before != (config, plan):
            write_text(self.path / "plan.toml", plan.to_toml())
            write_text(self.path / "run.toml", config.to_toml())

    @property
    def is_begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.path / "run.toml").exists()

    def require_new(self) -> None:
        """Raises UsageError if the folder holds a run already."""
        if self.is_begun:
            hint = f"paceline train --resume {self.path}, or another --out"
            raise UsageError(f"{self.path} holds a run already", hint=hint)

    def read(self) -> tuple[RunConfig, Plan]:
        """What the run is.

        Raises:
            UsageError: not a run folder.
        """
        if not self.is_begun:
            raise UsageError(f"{self.path} is not a run folder: it has no run.toml")
        config = RunConfig.from_toml(self.path / "run.toml")
        return config, Plan.from_toml(self.path / "plan.toml")

    def model_files(self) -> dict[str, str]:
        """The model's small files, name to text.

        Raises:
            UsageError: not a run folder.
        """
        if not (self.path / "model" / "config.json").exists():
            hint = "give a run folder, or a checkpoints/step-N in one"
            raise UsageError(f"{self.path} is not a run folder: no model/config.json", hint=hint)
        paths = [self.path / "model" / name for name in SMALL_FILES]
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}
