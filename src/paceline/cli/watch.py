"""``paceline watch``: what the ranks of a run are at, and who is at fault."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.options import Json, print_json
from paceline.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from paceline.resilience.frame import Frame

_EVERY_S = 0.5
_NUM_WAYS = 5


def watch(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run folder.")],
    once: Annotated[bool, typer.Option("--once", help="One look, and end.")] = False,
    as_json: Json = False,
) -> None:
    """Watch a run's ranks: their steps, what they wait in, slow links, the last verdict."""
    from rich.console import Console
    from rich.live import Live

    if as_json and not once:
        raise UsageError("--json goes with --once", hint=f"watch {run_folder} --once --json")
    found = _look(run_folder)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(found))
        return
    console = Console()
    if once:
        console.print(_picture(found))
        return
    with Live(_picture(found), console=console, auto_refresh=False) as live:
        while not _is_over(found):
            time.sleep(_EVERY_S)
            found = _look(run_folder)
            live.update(_picture(found), refresh=True)


def _look(run: Path) -> Frame:
    """What the run is at now.

    Raises:
        UsageError: nobody has left anything there.
    """
    import json

    from paceline.plan.plan import Plan
    from paceline.resilience.frame import frame
    from paceline.resilience.watch import Rings, mesh_of, verdict_path

    mesh = mesh_of(run)
    if mesh is None:
        hint = "set resilience.watch = true in the plan of the next run"
        raise UsageError(f"{run} has no rings: its ranks were not watched", hint=hint)
    plan_path, verdict = run / "plan.toml", None
    patience = (Plan.from_toml(plan_path) if plan_path.exists() else Plan()).resilience.patience
    if verdict_path(run).exists():
        verdict = json.loads(verdict_path(run).read_text())
    traces = Rings(run).read(range(mesh.num_ranks), is_whole=True)
    return frame(traces, mesh, time.time(), patience=patience, verdict=verdict)


def _is_over(found: Frame) -> bool:
    return all(line.state != "running" or line.process == "gone" for line in found.ranks)


def _picture(found: Frame) -> RenderableType:
    """A table of ranks, and what holds for all of them below it."""
    from rich.console import Group
    from rich.table import Table

    table = Table("rank", "place", "pid", "process", "at", "step", "signed", "waits in", "for")
    for line in found.ranks:
        table.add_row(
            str(line.rank),
            " ".join(f"{axis}={n}" for axis, n in line.coordinate.items()),
            str(line.pid),
            line.process if line.state == "running" else line.state,
            line.phase,
            str(line.step),
            f"{line.heartbeat_age_s:.1f} s ago",
            line.inside,
            f"{line.inside_s:.1f} s" if line.inside else "",
        )
    return Group(table, *_remarks(found))


def _remarks(found: Frame) -> list[str]:
    remarks: list[str] = []
    if found.missing:
        remarks.append(f"nothing yet from rank(s) {', '.join(map(str, found.missing))}")
    if found.step_time_s is None:
        remarks.append("no step has a usual length yet")
    else:
        remarks.append(
            f"median step {found.step_time_s:.3f} s; who is waited for hangs after "
            f"{found.hang_s:.1f} s"
        )
    remarks += [
        f"{way.source} to {way.destination} along {way.axis}: {way.delay_s * 1e3:.2f} ms, "
        f"of {way.num_transfers} transfers"
        for way in found.ways[:_NUM_WAYS]
    ]
    if found.verdict is not None:
        age_s = time.time() - found.verdict["time_s"]
        ranks = ", ".join(map(str, found.verdict["ranks"]))
        said = f"{found.verdict['kind']}, rank(s) {ranks}: {found.verdict['evidence']}"
        remarks.append(f"verdict, {age_s:.0f} s ago: {said}")
    return remarks
