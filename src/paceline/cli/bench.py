"""``paceline bench``: a claim measured beside a peer and a limit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from paceline.cli.options import Json, print_json


def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, for example generate.")],
    against: Annotated[str, typer.Option(help="The peer.")] = "transformers",
    model: Annotated[str, typer.Option(help="A MODEL.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure both sides in one run, in turns, and print the ratio with its spread."""
    from paceline.bench import BENCHMARKS

    outcome = BENCHMARKS.load(name)(against=against, model=model, dtype=dtype)
    if as_json:
        print_json(asdict(outcome))
        return
    ratios = outcome.ratios
    typer.echo(
        f"{outcome.name}, {model}, {outcome.device}\n"
        f"  ours    {outcome.ours:.1f} {outcome.unit}\n"
        f"  peer    {outcome.peer:.1f} {outcome.unit}  ({outcome.against})\n"
        f"  ratio   {ratios.median:.2f}, from {ratios.lowest:.2f} to {ratios.highest:.2f} "
        f"in {ratios.pairs} pairs\n"
        f"  limit   {outcome.limit:.1f} {outcome.unit}  ({outcome.limited_by}); "
        f"reached {outcome.fraction:.0%}"
    )
