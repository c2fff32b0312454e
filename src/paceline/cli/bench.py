"""``paceline bench``: a claim measured beside a peer and a limit."""

from __future__ import annotations

import inspect
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Json, print_json
from paceline.core.errors import UsageError, name_hint

if TYPE_CHECKING:
    from paceline.bench.outcome import Outcome


def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, for example generate.")],
    against: Annotated[str | None, typer.Option(help="The peer; each has its own.")] = None,
    model: Annotated[str | None, typer.Option(help="A MODEL; smollm2-135m or its sizes.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model; axes.", min=1)] = None,
    peer_python: Annotated[
        str | None, typer.Option(help="Python of an environment with the peer; serve.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure both sides in one run, in turns, and print the ratio with its spread."""
    from paceline.bench import BENCHMARKS

    run = BENCHMARKS.load(name)
    options = {
        "against": against,
        "model": model,
        "dtype": dtype,
        "layers": layers,
        "peer_python": peer_python,
    }
    given = {key: value for key, value in options.items() if value is not None}
    _require_read(name, given, list(inspect.signature(run).parameters))
    found: Outcome | dict[str, Outcome] = run(**given)
    if as_json:
        several = isinstance(found, dict)
        print_json({k: asdict(v) for k, v in found.items()} if several else asdict(found))
        return
    for outcome in found.values() if isinstance(found, dict) else [found]:
        typer.echo(_text(outcome))


def _require_read(name: str, given: dict[str, object], read: list[str]) -> None:
    """Raises UsageError for an option that a benchmark does not read."""
    for key in given:
        if key not in read:
            flag, *flags = (f"--{option.replace('_', '-')}" for option in (key, *read))
            raise UsageError(f"bench {name} does not read {flag}", hint=name_hint(flag, flags))


def _text(outcome: Outcome) -> str:
    ratios = outcome.ratios
    return (
        f"{outcome.name}, {outcome.device}\n"
        f"  ours    {outcome.ours:.4g} {outcome.unit}\n"
        f"  peer    {outcome.peer:.4g} {outcome.unit}  ({outcome.against})\n"
        f"  ratio   {ratios.median:.2f}, from {ratios.lowest:.2f} to {ratios.highest:.2f} "
        f"in {ratios.pairs} pairs\n"
        f"  limit   {outcome.limit:.4g} {outcome.unit}  ({outcome.limited_by}); "
        f"reached {outcome.fraction:.0%}"
    )
