"""How long tensors take from rank to rank: a matrix of delays, and what in it is slow."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from paceline.dist.calls import Call, Channel, RankTrace

UNIT_BYTES = 1 << 16
"""A delay counts for so many bytes; what is smaller costs latency alone, and counts as one unit."""
MIN_TRANSFERS = 8
"""Fewer of a pair say nothing."""
HOT = 4.0
"""A pair is slow where its delay is so many times that of the others."""
HOT_S = 1e-3
"""And longer than this for a unit."""

Pair = tuple[int, int]


class Slow(NamedTuple):
    """Something that is slow.

    Attributes:
        kind: a rank as a sender or a receiver, or what goes one way.
        ranks: of a link the sender, then the receiver.
        evidence: the figures, in words.
    """

    kind: Literal["slow-sender", "slow-receiver", "slow-link"]
    ranks: tuple[int, ...]
    evidence: str


class Cell(NamedTuple):
    """One entry of the matrix: seconds for a unit of bytes, of the transfers of a pair.

    Attributes:
        low: lower quartile.
        middle: median.
        high: upper quartile.
        count: of the transfers.
    """

    low: float
    middle: float
    high: float
    count: int


def delays(traces: Sequence[RankTrace]) -> dict[tuple[str, ...], dict[Pair, Cell]]:
    """For the ways along each axis: from source and destination to the delay.

    The delay of a transfer is the time from when it had been sent, and was waited for, until it was
    there: one that is there before it is wanted has none.
    """
    found: defaultdict[tuple[str, ...], defaultdict[Pair, list[float]]]
    found = defaultdict(lambda: defaultdict(list))
    for channel, sent, received in _transfers(traces):
        assert received.wait_s is not None
        assert received.leave_s is not None
        delay_s = max(0.0, received.leave_s - max(sent.enter_s, received.wait_s))
        source, destination = channel.members
        per_unit = delay_s / max(1.0, received.size_bytes / UNIT_BYTES)
        found[channel.axes][source, destination].append(per_unit)
    return {
        axes: {pair: _cell(times) for pair, times in pairs.items() if len(times) >= MIN_TRANSFERS}
        for axes, pairs in found.items()
    }


def slow_way(traces: Sequence[RankTrace]) -> Slow | None:
    """The rank or link that is slower than the others along its axis, if one is."""
    for axes, cells in delays(traces).items():
        hot = {pair for pair in cells if _is_hot(pair, cells)}
        if hot:
            return _named(",".join(axes), hot, cells)
    return None


def _transfers(traces: Sequence[RankTrace]) -> list[tuple[Channel, Call, Call]]:
    """What has been sent, with what has been received of it."""
    sent: dict[tuple[Channel, int], Call] = {}
    received: dict[tuple[Channel, int], Call] = {}
    for trace in traces:
        for call in trace.calls:
            if call.channel.is_way and call.phase == "training":
                ends = sent if call.operation == "send" else received
                ends[call.channel, call.sequence] = call
    return [
        (key[0], sent[key], call)
        for key, call in received.items()
        if key in sent and call.wait_s is not None and call.leave_s is not None
    ]


def _cell(times: Sequence[float]) -> Cell:
    low, middle, high = statistics.quantiles(times, n=4)
    return Cell(low, middle, high, len(times))


def _is_hot(pair: Pair, cells: Mapping[Pair, Cell]) -> bool:
    """Whether a pair is slower than the others, in the middle and in most of its transfers."""
    others = [cell for other, cell in cells.items() if other != pair]
    if not others:
        return False
    cell = cells[pair]
    usual = statistics.median(other.middle for other in others)
    high = statistics.median(other.high for other in others)
    return cell.middle > max(HOT_S, HOT * usual) and cell.low > high


def _named(axis: str, hot: set[Pair], cells: Mapping[Pair, Cell]) -> Slow:
    """A whole row is a sender, a whole column a receiver, and a single cell a link."""
    for end, kind in ((0, "slow-sender"), (1, "slow-receiver")):
        for rank in sorted({pair[end] for pair in hot}):
            own = {pair for pair in cells if pair[end] == rank}
            if len(own) > 1 and own <= hot:
                verb = "sends" if end == 0 else "receives"
                text = f"all that rank {rank} {verb} along {axis} is slow: {_figures(own, cells)}"
                return Slow(
                    "slow-sender" if kind == "slow-sender" else "slow-receiver", (rank,), text
                )
    pair = max(hot, key=lambda pair: cells[pair].middle)
    text = f"rank {pair[0]} to rank {pair[1]} along {axis} is slow: {_figures({pair}, cells)}"
    return Slow("slow-link", pair, text)


def _figures(slow: set[Pair], cells: Mapping[Pair, Cell]) -> str:
    others = [cell.middle for pair, cell in cells.items() if pair not in slow]
    own = statistics.median(cells[pair].middle for pair in slow)
    usual = statistics.median(others)
    unit = f"a {UNIT_BYTES >> 10} KiB unit"
    return f"{own * 1e3:.2f} ms for {unit}, where others take {usual * 1e3:.2f} ms"
