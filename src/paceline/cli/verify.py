"""``paceline verify``: does a plan compute what one process would?"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from paceline.cli.options import Json, PlanFile, Settings, print_json, read_plan, say_warnings
from paceline.core.errors import PacelineError, UsageError


def verify(
    plan_file: PlanFile = None,
    model: Annotated[
        str | None, typer.Option(help="A MODEL; by default a tiny random one.")
    ] = None,
    settings: Settings = None,
    fuzz: Annotated[
        int | None, typer.Option(min=1, help="Certify so many random plans instead.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random plans.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare a plan's gradients and weights with a one-process float64 oracle."""
    if fuzz is not None:
        if plan_file or settings or model:
            raise UsageError("--fuzz draws plans and models itself", hint="leave out the others")
        _fuzz(fuzz, seed, as_json=as_json)
        return
    from paceline.models.hub import resolve
    from paceline.plan.check import require, warnings
    from paceline.verify.certify import BOUND, certify
    from paceline.verify.tiny import tiny_spec

    plan = read_plan(plan_file, settings)
    require(plan, source=str(plan_file or "the plan"))
    source = resolve(model) if model else None
    spec, weights = (source.spec, source.weights) if source else (tiny_spec(plan), None)
    require(plan, spec, source=str(plan_file or "the plan"))
    say_warnings(warnings(plan, spec))
    certificate = certify(plan, spec, weights, say=partial(typer.echo, err=True))
    if as_json:
        print_json(asdict(certificate))
        raise typer.Exit(0 if certificate.certified else 1)
    summary = (
        f"largest relative errors on {plan.mesh.num_ranks} rank(s), float64: "
        f"gradients {certificate.max_rel_grad_error:.1e}, "
        f"weights {certificate.max_rel_param_error:.1e}, loss {certificate.loss_error:.1e}\n"
        f"worst: {certificate.worst}"
    )
    if not certificate.certified:
        raise PacelineError(f"not certified: {summary}", hint=f"the bound is {BOUND:.0e}")
    typer.echo(f"certified: {summary}")


def _fuzz(count: int, seed: int, *, as_json: bool) -> None:
    from paceline.verify.fuzz import fuzz

    numbers = iter(range(1, count + 1))
    report = fuzz(
        count,
        seed,
        advance=lambda line: typer.echo(f"{next(numbers)}/{count}  {line}", err=True),
    )
    if as_json:
        print_json(asdict(report))
        raise typer.Exit(1 if report.failed else 0)
    typer.echo(
        f"{report.drawn} plans: {report.certified} certified, {report.refused} refused, "
        f"{len(report.failed)} failed\nworst: {report.worst}"
    )
    for reason, times in report.reasons.most_common():
        typer.echo(f"refused {times} time(s): {reason}")
    if report.failed:
        first = report.failed[0]
        raise PacelineError(f"not certified: {first['why']}", hint=f"its plan:\n{first['plan']}")
