"""A run as its folder tells it: what it is, and what counts of what was logged.

A run that was resumed has logged some steps twice, or has gone back behind steps that it had
taken: the later word counts. A run that is being written, or was killed, is read as far as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.core.config import read_toml
from paceline.core.errors import UsageError
from paceline.core.record import read_records
from paceline.plan.plan import Plan

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RankLog:
    """What one rank has logged, in order of steps.

    Attributes:
        rank: number.
        starts: of the run and its resumptions.
        steps: those that count.
        evaluations: likewise; they carry ``loss`` and ``perplexity`` of held-out data.
        saves: likewise.
    """

    rank: int
    starts: list[Values]
    steps: list[Values]
    evaluations: list[Values]
    saves: list[Values]

    @property
    def memory_bytes(self) -> int:
        """The most that the rank has held."""
        return max((step["memory_bytes"] for step in self.steps), default=0)

    def median(self, key: str) -> float:
        """Of a step's values; the first step, which warms up, is left out where there are more."""
        values = [step[key] for step in self.steps[1:] or self.steps]
        return statistics.median(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """A run.

    Attributes:
        path: its folder.
        config: what ``run.toml`` says.
        plan: what ``plan.toml`` says, dotted key to value.
        changed: keys of `plan` whose value is not the default.
        ranks: in order, at least one.
    """

    path: Path
    config: Values
    plan: Values
    changed: frozenset[str]
    ranks: list[RankLog]

    @property
    def first(self) -> RankLog:
        """The rank that speaks for all where all know the same."""
        return self.ranks[0]

    @property
    def worst(self) -> RankLog:
        """The rank that has held the most memory."""
        return max(self.ranks, key=lambda log: log.memory_bytes)

    @property
    def num_steps(self) -> int:
        """How many steps the run was to take when it last began."""
        return self.first.starts[-1]["num_steps"] if self.first.starts else self.config["steps"]

    @property
    def resumed_at(self) -> list[int]:
        """First steps of resumptions."""
        return [start["first_step"] for start in self.first.starts[1:]]

    def summary(self) -> Values:
        """The figures of the run."""
        steps, evaluations = self.first.steps, self.first.evaluations
        return {
            "model": self.config.get("model"),
            "steps": steps[-1]["step"],
            "num_steps": self.num_steps,
            "loss": steps[-1]["loss"],
            "eval_loss": evaluations[-1]["loss"] if evaluations else None,
            "perplexity": evaluations[-1]["perplexity"] if evaluations else None,
            "tokens": sum(step["tokens"] for step in steps),
            "tokens_per_s": self.first.median("tokens_per_s"),
            "peak_share": self.first.median("peak_share"),
            "time_s": sum(step["time_s"] for step in steps),
            "memory_bytes": self.worst.memory_bytes,
            "worst_rank": self.worst.rank,
            "ranks": len(self.ranks),
            "saves": len(self.first.saves),
            "resumptions": len(self.resumed_at),
        }


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        UsageError: it is not one, or no step has been logged yet.
        DataError: a record that is broken, other than a last line that is being written.
    """
    files = sorted((folder / "records").glob("rank-*.jsonl"), key=_rank_of)
    if not (folder / "run.toml").exists():
        raise UsageError(
            f"{folder} is not a run folder: it has no run.toml",
            hint="give the folder that --out named",
        )
    ranks = [read_log(_rank_of(path), read_records(path)) for path in files]
    if not ranks or not ranks[0].steps:
        raise UsageError(f"{folder} has no step in its records yet", hint="try again in a while")
    plan = dict(_flat(read_toml(folder / "plan.toml")))
    defaults = dict(_flat(Plan().to_dict()))
    changed = frozenset(key for key, value in plan.items() if defaults.get(key) != value)
    return Run(folder, read_toml(folder / "run.toml"), plan, changed, ranks)


def read_log(rank: int, records: Iterable[Values]) -> RankLog:
    """What counts of a rank's records, in the order in which they were written."""
    starts: list[Values] = []
    kept: dict[str, dict[int, Values]] = {"step": {}, "eval": {}, "save": {}}
    for record in records:
        kind = record["kind"]
        if kind == "run":
            starts.append(record)
            for found in kept.values():  # it starts anew there: what came after is void
                for step in [step for step in found if step >= record["first_step"]]:
                    del found[step]
        elif kind in kept:
            kept[kind][record["step"]] = record
    steps, evaluations, saves = ([found[step] for step in sorted(found)] for found in kept.values())
    return RankLog(rank, starts, steps, evaluations, saves)


def _rank_of(path: Path) -> int:
    number = path.stem.removeprefix("rank-")
    return int(number) if number.isdecimal() else -1


def _flat(table: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested table as dotted keys and values."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
