"""What rules between techniques may look at, and how they say what is wrong."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.core.config import Config
from paceline.core.errors import Problem
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Known:
    """What a rule may look at."""

    plan: Plan
    spec: ModelSpec | None
    num_ranks: int | None

    def problem(self, path: str, rule: str, hint: str = "") -> Problem:
        """A key whose value breaks a rule."""
        return Problem(path, json.dumps(value_at(self.plan, path)), rule, hint)


Rule = Callable[[Known], Iterator[Problem]]


def value_at(config: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def divisors(count: int) -> list[int]:
    """From 1 to the count itself."""
    return [n for n in range(1, count + 1) if count % n == 0]


def nearest(value: int, legal: Sequence[int]) -> str:
    """The legal values on both sides of one, as text."""
    below = [n for n in legal if n < value][-1:]
    return " or ".join(map(str, below + [n for n in legal if n > value][:1]))


def schedule_of(name: str) -> Any:
    """A pipeline schedule, for its traits."""
    return importlib.import_module("paceline.parallel.pipeline").SCHEDULES.load(name)
