"""What a watched run is at, at a moment: as data, for a table or for a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.dist.calls import RankTrace
from paceline.plan.mesh import MeshConfig
from paceline.resilience.delays import delays
from paceline.resilience.verdict import timeouts_of


@dataclass(frozen=True, slots=True)
class RankLine:
    """One rank.

    Attributes:
        rank: which.
        coordinate: its place on the axes that have several ranks.
        host: where its process runs.
        pid: of that.
        process: whether it is there.
        state: whether it has ended, and how, as it says itself.
        phase: what it is at.
        step: the last one finished.
        heartbeat_age_s: since its last sign of life.
        inside: the call that it waits in; empty where it waits in none.
        inside_s: for how long.
    """

    rank: int
    coordinate: dict[str, int]
    host: str
    pid: int
    process: str
    state: str
    phase: str
    step: int
    heartbeat_age_s: float
    inside: str
    inside_s: float


@dataclass(frozen=True, slots=True)
class WayLine:
    """The transfers from one rank to another.

    Attributes:
        axis: of the mesh.
        source: sends.
        destination: receives.
        delay_s: median, for a unit of bytes.
        num_transfers: that it is of.
    """

    axis: str
    source: int
    destination: int
    delay_s: float
    num_transfers: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A run at a moment.

    Attributes:
        ranks: in order; those that have left something.
        missing: those that have not.
        ways: slowest first.
        step_time_s: median; None before there are some.
        hang_s: after so long a wait a rank is taken to hang.
        verdict: what the watcher of the run has said last, and when; None: nothing.
    """

    ranks: tuple[RankLine, ...]
    missing: tuple[int, ...]
    ways: tuple[WayLine, ...]
    step_time_s: float | None
    hang_s: float
    verdict: Mapping[str, Any] | None


def frame(
    traces: Sequence[RankTrace],
    mesh: MeshConfig,
    now_s: float,
    *,
    patience: float,
    verdict: Mapping[str, Any] | None,
) -> Frame:
    """A run as its ranks' traces, with finished calls, show it.

    Args:
        traces: of the ranks that there are.
        mesh: of the run.
        now_s: the time, since the epoch.
        patience: as of `judge`.
        verdict: the last one, as it has been written down.
    """
    timeouts = timeouts_of(traces, patience)
    present = {trace.rank for trace in traces}
    return Frame(
        ranks=tuple(_rank_line(trace, mesh, now_s) for trace in traces),
        missing=tuple(rank for rank in range(mesh.num_ranks) if rank not in present),
        ways=_way_lines(traces),
        step_time_s=timeouts.step_s,
        hang_s=timeouts.hang_s,
        verdict=verdict,
    )


def _rank_line(trace: RankTrace, mesh: MeshConfig, now_s: float) -> RankLine:
    axes = {axis: n for axis, n in mesh.coordinate(trace.rank).items() if getattr(mesh, axis) > 1}
    waits = [c for c in trace.calls if c.leave_s is None and c.wait_s is not None]
    inside = waits[-1] if waits and trace.state == "running" else None
    purpose = "" if inside is None or inside.channel.is_way else f" {inside.purpose}"
    return RankLine(
        rank=trace.rank,
        coordinate=axes,
        host=trace.host,
        pid=trace.pid,
        process=trace.process,
        state=trace.state,
        phase=trace.phase,
        step=trace.step,
        heartbeat_age_s=max(0.0, now_s - trace.heartbeat_s),
        inside=f"{inside.operation} {inside.channel}{purpose}" if inside else "",
        inside_s=max(0.0, now_s - (inside.wait_s or now_s)) if inside else 0.0,
    )


def _way_lines(traces: Sequence[RankTrace]) -> tuple[WayLine, ...]:
    lines = [
        WayLine(",".join(axes), source, destination, cell.unit_s, cell.num_transfers)
        for axes, cells in delays(traces).items()
        for (source, destination), cell in cells.items()
    ]
    return tuple(sorted(lines, key=lambda line: line.delay_s, reverse=True))
