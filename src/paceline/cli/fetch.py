"""``paceline fetch``: a model into the cache."""

from __future__ import annotations

from typing import Annotated

import typer

from paceline.cli.options import Json, print_json


def fetch(
    name: Annotated[
        str, typer.Argument(help="A known model (smollm2-135m), or ORG/NAME of a repository.")
    ],
    as_json: Json = False,
) -> None:
    """Fetch a model and print the folder that it is in."""
    from paceline.models import hub

    path = hub.fetch(name)
    if name in hub.KNOWN:
        hub.verify_folder(path)
    if as_json:
        print_json({"path": str(path)})
    else:
        typer.echo(path)
