"""The command line's entry: the table of verbs, and what becomes of errors."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from types import FrameType
from typing import Annotated

import typer
import typer.main

import paceline
from paceline.cli import (
    bench,
    chat,
    check,
    checkpoint,
    convert,
    doctor,
    fetch,
    generate,
    report,
    serve,
    train,
    verify,
    watch,
)
from paceline.core.errors import PacelineError
from paceline.dist.launch import is_spoken_for

_USAGE, _INTERRUPTED = 2, 130
_AFTERMATH_S = 5.0
_interrupted_s = -math.inf  # when, on the monotonic clock

# typer carries its own copy of click, in which the base of usage errors has no public name.
_CommandLineError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

app = typer.Typer(
    name="paceline",
    help="Plan, prove, train, checkpoint and serve large models in parallel, on one plan file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(fetch.fetch)
app.command()(doctor.doctor)
app.command()(check.check)
app.command()(train.train)
app.command()(verify.verify)
app.add_typer(checkpoint.app, name="checkpoint")
app.command()(convert.convert)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(watch.watch)
app.command()(report.report)
app.command()(bench.bench)


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
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        exit_code = app(standalone_mode=False) or 0
        if exit_code == _INTERRUPTED:  # typer has caught the interrupt
            raise KeyboardInterrupt
        sys.exit(exit_code)
    except PacelineError as error:
        _fail_if_interrupted()
        _leave_to_launcher(error)
        fail(error.message, error.hint, error.exit_code)
    except _CommandLineError as error:
        known = {command.name for command in typer.main.get_group(app).commands.values()}
        verb = [argument for argument in sys.argv[1:2] if argument in known]
        hint = " ".join(["paceline", *verb, "--help"])
        fail(error.format_message(), hint, _USAGE)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", "", _INTERRUPTED)
    except Exception as error:
        _fail_if_interrupted()
        _leave_to_launcher(error)
        raise


def _leave_to_launcher(error: Exception) -> None:
    """Ends this process, if it is a rank of which `launch_ranks` tells what has ended it."""
    if is_spoken_for():
        from paceline.dist.failure import hand_over

        hand_over(error)


def _fail_if_interrupted() -> None:
    """What an interrupt has broken off may fail in words of its own, as torch's writer does."""
    if time.monotonic() - _interrupted_s < _AFTERMATH_S:
        fail("interrupted", "", _INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but ends at once inside an import: torch's swallow it at times."""
    global _interrupted_s
    _interrupted_s = time.monotonic()
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            print("error: interrupted", file=sys.stderr, flush=True)
            os._exit(_INTERRUPTED)
        outer = outer.f_back
    signal.default_int_handler(number, frame)


def fail(message: str, hint: str, exit_code: int) -> None:
    """Prints an error to stderr, its hint on a line of its own, and exits."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"\nhint: {hint}", file=sys.stderr)
    sys.exit(exit_code)
