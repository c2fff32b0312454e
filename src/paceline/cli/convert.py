"""``paceline convert``: a model as another architecture with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Json, print_json


def convert(
    model: Annotated[str, typer.Argument(help="The MODEL to convert.")],
    to: Annotated[str, typer.Option("--to", help="ladder: a residual whose sums overlap.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    layers: Annotated[str, typer.Option(help="upper-half or all.")] = "upper-half",
    as_json: Json = False,
) -> None:
    """Write a model as another architecture, in Hugging Face layout, to be trained further.

    The weights stay as they are; what the model computes does not, until training has mended it.
    """
    from paceline.models import hub
    from paceline.models.convert import convert as write_converted

    spec = write_converted(hub.resolve(model), to, layers, out)
    if as_json:
        found = {"num_layers": spec.num_layers, "ladder_from": spec.ladder_from}
        print_json({"path": str(out), "to": to, "family": spec.family, **found})
    else:
        typer.echo(out)
