"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.core.errors import UsageError

if TYPE_CHECKING:
    from paceline.plan.plan import Plan

PlanFile = Annotated[Path | None, typer.Option("--plan", help="Plan file (TOML).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a plan key: a.b=value. Repeatable.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or auto; beats the plan.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")]

DTYPES = ("float32", "bfloat16", "auto")


def read_plan(file: Path | None, settings: list[str] | None, base: Plan | None = None) -> Plan:
    """The plan of a file, or `base`, or the default, with the settings applied.

    Raises:
        ConfigError: what does not parse, all of it.
    """
    from paceline.plan.plan import Plan

    plan = Plan.from_toml(file) if file else base or Plan()
    return plan.with_overrides(settings) if settings else plan


def require_dtype(dtype: str | None) -> None:
    """Raises UsageError if the flag names no dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")


def print_json(value: Any) -> None:
    """The one JSON object that ``--json`` promises."""
    typer.echo(json.dumps(value))
