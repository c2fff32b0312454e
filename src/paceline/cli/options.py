"""Options that several verbs share, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.core.errors import ConfigError, Problem, UsageError

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
        ConfigError: what does not parse, and all else that is wrong with the plan.
    """
    from paceline.plan.check import check

    plan, unread = parse_plan(file, settings, base)
    if unread:
        source = " and ".join([*([str(file)] if file else []), *(["--set"] if settings else [])])
        raise ConfigError(check(plan, unread=unread), source=source)
    return plan


def parse_plan(
    file: Path | None, settings: list[str] | None, base: Plan | None = None
) -> tuple[Plan, list[Problem]]:
    """The plan as `read_plan` gives it, with defaults for what does not parse, and why not."""
    from paceline.core.config import assign, read_toml
    from paceline.plan.plan import Plan

    data = read_toml(file) if file else (base or Plan()).to_dict()
    plan, unread = Plan.parse(assign(data, settings or [], str(file or "--set")))
    return plan or Plan(), unread


def require_dtype(dtype: str | None) -> None:
    """Raises UsageError if the flag names no dtype."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"one of {', '.join(DTYPES)}")


def say_warnings(warnings: Iterable[Problem]) -> None:
    """Tells what a plan would do better otherwise."""
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)


def print_json(value: Any) -> None:
    """The one JSON object that ``--json`` promises."""
    typer.echo(json.dumps(value))
