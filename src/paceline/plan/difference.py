"""Where two plans differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from paceline.core.config import Config, plain
from paceline.plan.plan import Plan
from paceline.plan.rules.known import value_at


def changed_keys(before: Plan, after: Plan) -> dict[str, Any]:
    """Dotted paths of the keys whose values differ, in the order of the plan, to the new values."""
    paths = [path for path in leaves(before) if value_at(after, path) != value_at(before, path)]
    return {path: plain(value_at(after, path)) for path in paths}


def leaves(config: Config, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all keys of a config, those of its tables in place of the tables."""
    for field in fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        if isinstance(value, Config):
            yield from leaves(value, f"{path}.")
        else:
            yield path
