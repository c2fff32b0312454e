"""``paceline report``: a run's records as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Json, print_json


def report(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")],
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write event files for TensorBoard into this folder too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Report on a run, finished or not, as one HTML page that needs nothing else."""
    from paceline.core.files import write_text
    from paceline.report.page import page
    from paceline.report.read import read_run
    from paceline.report.tensorboard import write_events

    run = read_run(run_folder)
    if tensorboard is not None:
        write_events(run, tensorboard)
    write_text(out, page(run))
    if as_json:
        print_json({"path": str(out), **run.summary()})
    else:
        typer.echo(out)
