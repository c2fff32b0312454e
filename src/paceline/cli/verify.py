"""``paceline verify``: does a plan compute what one process would?"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from paceline.cli.options import Json, PlanFile, Settings, print_json, read_plan
from paceline.core.errors import PacelineError


def verify(
    plan_file: PlanFile = None,
    model: Annotated[
        str | None, typer.Option(help="A MODEL; by default a tiny random one.")
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Compare a plan's gradients and weights with a one-process float64 oracle."""
    from paceline.models.hub import resolve
    from paceline.plan.check import require
    from paceline.verify.certify import BOUND, certify

    plan = read_plan(plan_file, settings)
    source = resolve(model) if model else None
    require(plan, source.spec if source else None, source=str(plan_file or "the plan"))
    spec, weights = (source.spec, source.weights) if source else (None, None)
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
