"""What is wrong with a run, and with which of its ranks: judged from plain data that they leave.

Source: Dong et al., Boosting Large-scale Parallel Training Efficiency with C4, arXiv:2406.04594.
Differs: no collective is added, and nothing is compared with other runs: every threshold comes from
    the traces themselves and one number, `resilience.patience`.

A rank that has ended is looked for first, then one that others wait for in vain, then one that is
late, then links: the first finding is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from paceline.dist.calls import Call, RankTrace
from paceline.resilience.delays import slow_way
from paceline.resilience.lateness import late_rank

Kind = Literal[
    "crash", "hang", "transport", "straggler", "slow-sender", "slow-receiver", "slow-link"
]

MIN_STEPS = 3
"""Fewer steps than this have no usual length."""
FLOOR_S = 2.0
"""No process is taken to stand still before: machines do stand still for a second."""
LATE_FLOOR_S = 15.0
"""And no rank whose process runs is taken to hang before: it may be about to come."""
LATE = 3.0
"""Such a rank has so many times as long as one that is seen to stand still."""
FLOOR_STEPS = 10.0
"""Nor before so many median steps."""
PHASE_S = 300.0
"""Time-out of what has no usual length: starting, saving, evaluating."""
STALE_S = 1.5
"""A process that has not signed for so long does not run; it signs ten times a second."""


TOGETHER_S = 0.25
"""Of ranks whose last signs are so close, none is known to have ended first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is wrong with a run.

    Attributes:
        kind: ``crash``: a rank has ended; ``hang``: it never came to a collective that others wait
            in; ``transport``: all came and none leaves; ``straggler``: it comes late; the others:
            what it sends, receives, or what goes over one link is slow.
        ranks: whose fault it is; of a link the sender, then the receiver.
        evidence: the figures that say so, in words.
    """

    kind: Kind
    ranks: tuple[int, ...]
    evidence: str

    def is_same(self, other: Verdict) -> bool:
        """Whether another one tells of the same, in whatever figures."""
        return (self.kind, self.ranks) == (other.kind, other.ranks)


class Timeouts(NamedTuple):
    """How long ranks wait for each other before one is taken to hang.

    Attributes:
        step_s: median step; None before there are some.
        hang_s: while all ranks train, where its process is seen to stand still.
        late_s: the same, where its process runs.
        phase_s: while one does something else.
    """

    step_s: float | None
    hang_s: float
    late_s: float
    phase_s: float


def timeouts_of(traces: Sequence[RankTrace], patience: float) -> Timeouts:
    """The time-outs that a run's own steps give.

    Args:
        traces: of its ranks.
        patience: deviations beyond the median that a step may take.
    """
    times = [s.end_s - s.begin_s for trace in traces for s in trace.steps if s.is_plain]
    if len(times) < MIN_STEPS:
        return Timeouts(None, PHASE_S, PHASE_S, PHASE_S)
    middle = statistics.median(times)
    # 1.4826 times the median deviation is the standard deviation of what is normally distributed,
    # and unlike that it does not grow with a few outliers.
    spread = 1.4826 * statistics.median(abs(time - middle) for time in times)
    hang_s = max(FLOOR_S, FLOOR_STEPS * middle, middle + patience * spread)
    late_s = max(LATE_FLOOR_S, LATE * hang_s)
    return Timeouts(middle, hang_s, late_s, max(PHASE_S, late_s))


def judge(traces: Sequence[RankTrace], now_s: float, *, patience: float) -> Verdict | None:
    """What is wrong, if anything is.

    Args:
        traces: of the ranks that there are; with finished calls, lateness and links are judged too.
        now_s: the time, since the epoch.
        patience: deviations of a step that are nothing special.
    """
    if (found := _ended(traces)) is not None:
        return found
    timeouts = timeouts_of(traces, patience)
    if (found := _hang(traces, now_s, timeouts)) is not None:
        return found
    if timeouts.step_s is None:
        return None
    if (late := late_rank(traces, timeouts.step_s, patience)) is not None:
        return Verdict("straggler", (late.rank,), late.evidence)
    if (slow := slow_way(traces)) is not None:
        return Verdict(slow.kind, slow.ranks, slow.evidence)
    return None


def _ended(traces: Sequence[RankTrace]) -> Verdict | None:
    """The first rank to end, of those that neither are done nor have lost another one."""
    ended = [
        trace
        for trace in traces
        if trace.state == "failed" or (trace.state == "running" and trace.process == "gone")
    ]
    if not ended:
        return None
    first_s = min(map(_last_sign_s, ended))
    # Those whom a launcher ends at once look as if they had ended first; but they wait in a
    # collective, for the one that has.
    together = [trace for trace in ended if _last_sign_s(trace) < first_s + TOGETHER_S]
    first = min(together, key=lambda trace: (_is_waiting(trace), _last_sign_s(trace)))
    how = "an error of its own has ended it" if first.state == "failed" else "its process is gone"
    return Verdict("crash", (first.rank,), f"{how}, after step {first.step}; {_last_call(first)}")


def _is_waiting(trace: RankTrace) -> bool:
    return any(call.leave_s is None and call.wait_s is not None for call in trace.calls)


def _last_sign_s(trace: RankTrace) -> float:
    """When a rank is known to have run."""
    stamps = [call.leave_s or call.wait_s or call.enter_s for call in trace.calls[-1:]]
    return max(trace.heartbeat_s, *stamps, 0.0)


class _Wait(NamedTuple):
    """A rank that waits.

    Attributes:
        call: what for.
        since_s: when it began to.
        missing: who has not come; nobody: all have, and yet it waits.
    """

    call: Call
    since_s: float
    missing: tuple[int, ...]


def _hang(traces: Sequence[RankTrace], now_s: float, timeouts: Timeouts) -> Verdict | None:
    by_rank = {trace.rank: trace for trace in traces if trace.state == "running"}
    trains = all(trace.phase == "training" for trace in by_rank.values())
    limit_s = timeouts.hang_s if trains else timeouts.phase_s
    if all(now_s - trace.heartbeat_s > STALE_S for trace in by_rank.values()):
        # Nobody signs: all have been suspended, or the machine has; that is no rank's fault. But
        # one that is alone may be stopped.
        return _stopped(by_rank, now_s, timeouts) if len(by_rank) == 1 else None
    waits = {rank: _wait(trace, by_rank) for rank, trace in by_rank.items()}
    held = {rank: wait for rank, wait in waits.items() if wait is not None}
    late = [rank for rank, wait in held.items() if now_s - wait.since_s > limit_s]
    if not late:
        return _stopped(by_rank, now_s, timeouts)
    found = _culprits(late, held, by_rank, now_s)
    longest_s = max(now_s - held[rank].since_s for rank in late)
    is_seen = any(_is_frozen(by_rank[rank], now_s) for rank in found.ranks if rank in by_rank)
    return found if is_seen or longest_s > timeouts.late_s else None


def _wait(trace: RankTrace, by_rank: Mapping[int, RankTrace]) -> _Wait | None:
    """What a rank waits in, and for whom."""
    open_waits = [c for c in trace.calls if c.leave_s is None and c.wait_s is not None]
    if not open_waits:
        return None
    call = max(open_waits, key=lambda call: call.wait_s or 0.0)
    missing = [
        rank
        for rank in call.channel.members
        if rank not in by_rank or by_rank[rank].reached.get(call.channel, 0) < call.sequence
    ]
    return _Wait(call, call.wait_s or call.enter_s, tuple(missing))


def _stopped(by_rank: Mapping[int, RankTrace], now_s: float, timeouts: Timeouts) -> Verdict | None:
    """A process that has been stopped, whether anybody waits for it or not."""
    limit_s = FLOOR_S if timeouts.step_s is None else timeouts.hang_s
    for trace in by_rank.values():
        if trace.process == "stopped" and now_s - trace.heartbeat_s > limit_s:
            return Verdict("hang", (trace.rank,), _condition(trace, now_s))
    return None


def _culprits(
    late: Sequence[int],
    held: Mapping[int, _Wait],
    by_rank: Mapping[int, RankTrace],
    now_s: float,
) -> Verdict:
    """Follows who waits for whom, to those who wait for nobody."""
    seen = list(late)
    for rank in seen:  # grows as it goes
        wait = held.get(rank)
        seen += [m for m in wait.missing if m not in seen] if wait is not None else []
    first = min((held[rank] for rank in late), key=lambda wait: wait.since_s)
    start = _say_wait(late, first, now_s)
    free = [rank for rank in seen if rank not in held]
    frozen = [rank for rank in seen if rank in by_rank and _is_frozen(by_rank[rank], now_s)]
    frozen += [r for r in _inside(seen, held) if r not in frozen and _is_frozen(by_rank[r], now_s)]
    if named := sorted(frozen or free):
        said = "; ".join(_condition(by_rank[r], now_s) for r in named if r in by_rank)
        lacking = [rank for rank in named if rank not in by_rank]
        never = f"rank(s) {_list(lacking)} left or never came" if lacking else ""
        return Verdict("hang", tuple(named), "; ".join(filter(None, (start, said, never))))
    if stuck := _inside(seen, held):
        return Verdict("transport", tuple(stuck), f"{start}; all have come, and none leaves")
    circle = sorted(seen)
    text = "; ".join(f"rank {r} waits in {_name(held[r].call)}" for r in circle)
    return Verdict("hang", tuple(circle), f"{start}; a deadlock, each waits for another: {text}")


def _inside(seen: Iterable[int], held: Mapping[int, _Wait]) -> list[int]:
    """Members of the calls that all have come to, and that somebody still waits in."""
    full = [held[r].call.channel.members for r in seen if r in held and not held[r].missing]
    return sorted({member for members in full for member in members})


def _is_frozen(trace: RankTrace, now_s: float) -> bool:
    return trace.process == "stopped" or now_s - trace.heartbeat_s > STALE_S


def _say_wait(late: Sequence[int], first: _Wait, now_s: float) -> str:
    lasting = now_s - first.since_s
    return f"rank(s) {_list(late)} have waited up to {lasting:.1f} s in {_name(first.call)}"


def _condition(trace: RankTrace, now_s: float) -> str:
    """What a rank is at, as far as it shows."""
    age_s = now_s - trace.heartbeat_s
    if trace.process == "stopped":
        text = f"its process is stopped, and has not signed for {age_s:.1f} s"
    elif age_s > STALE_S:
        text = f"its process has not signed for {age_s:.1f} s"
    else:
        text = "its process runs and has not come"
    return f"rank {trace.rank}: {text}; {_last_call(trace)}"


def _last_call(trace: RankTrace) -> str:
    if not trace.calls:
        return f"in no collective, after step {trace.step}"
    last = trace.calls[-1]
    return f"{'last in' if last.leave_s else 'in'} {_name(last)}"


def _name(call: Call) -> str:
    purpose = "" if call.channel.is_way else f" {call.purpose}"
    return f"{call.operation} {call.sequence} of {call.channel}{purpose}"


def _list(ranks: Iterable[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
