"""``paceline check``: every problem of a plan at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Json, Settings, parse_plan, print_json, say_warnings
from paceline.core.errors import ConfigError


def check(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="Plan file (TOML).")],
    model: Annotated[str | None, typer.Option(help="Check against this MODEL too.")] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Report every problem of a plan, and what it would do better otherwise; exit with 2 if there
    is a problem.
    """
    from paceline.plan.check import check as problems_of
    from paceline.plan.check import warnings as warnings_of

    spec = None
    if model:
        from paceline.models.hub import read_model_spec

        spec = read_model_spec(model)
    plan, unread = parse_plan(plan_file, settings)
    problems = problems_of(plan, spec, unread=unread)
    warnings = [] if problems else warnings_of(plan, spec)
    if as_json:
        found = {"problems": problems, "warnings": warnings}
        print_json({kind: [problem.to_dict() for problem in of] for kind, of in found.items()})
        raise typer.Exit(2 if problems else 0)
    if problems:
        raise ConfigError(problems, source=str(plan_file))
    say_warnings(warnings)
    typer.echo(f"{plan_file}: no problems")
