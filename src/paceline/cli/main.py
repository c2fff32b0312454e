"""The command line's entry: the table of verbs, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Annotated

import click
import typer

import paceline
from paceline.cli import chat, check, checkpoint, fetch, generate, serve, train, verify
from paceline.core.errors import PacelineError

_INTERRUPTED = 130

app = typer.Typer(
    name="paceline",
    help="Plan, prove, train, checkpoint and serve large models in parallel, on one plan file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(fetch.fetch)
app.command()(check.check)
app.command()(train.train)
app.command()(verify.verify)
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(paceline.__version__)
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs a command. Exit codes: 0 done, 1 the run or a check failed, 2 usage or configuration."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except PacelineError as error:
        fail(error.message, error.hint, error.exit_code)
    except click.ClickException as error:
        hint = f"paceline {' '.join(sys.argv[1:2])} --help".replace("  ", " ")
        fail(error.format_message(), hint, error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted", "", _INTERRUPTED)


def fail(message: str, hint: str, exit_code: int) -> None:
    """Prints an error to stderr, its hint on a line of its own, and exits."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"\nhint: {hint}", file=sys.stderr)
    sys.exit(exit_code)
