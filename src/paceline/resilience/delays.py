"""How long tensors take from rank to rank: a matrix of delays, and what in it is slow."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from paceline.dist.calls import Call, Channel, RankTrace

UNIT_BYTES = 1 << 16
"""A delay counts for so many bytes; what is smaller costs latency alone, and counts as one unit."""
MIN_TRANSFERS = 6
"""Fewer of a pair say nothing."""
HOT = 4.0
"""A pair is slow where its usual delay is so many times that of the others."""
HOT_S = 8e-3
"""And longer than this: where ranks share a core, one that a transfer wakes may have to wait for a
slice of the scheduler or two, 3 ms each, every time."""
WAITED_S = 1e-3
"""A wait that is shorter may have found the tensor there."""

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
    """One entry of the matrix: the delays of a pair.

    Attributes:
        delay_s: median.
        unit_s: median for a unit of bytes.
        mean_s: mean.
        num_transfers: that they are of.
    """

    delay_s: float
    unit_s: float
    mean_s: float
    num_transfers: int


def delays(traces: Sequence[RankTrace]) -> dict[tuple[str, ...], dict[Pair, Cell]]:
    """For the ways along each axis: from source and destination to the delay.

    The delay of a transfer is the time from when both ends had begun it until it was there. That is
    known where the receiver has waited for it to come; of one that had come before, nothing is.
    """
    found: defaultdict[tuple[str, ...], defaultdict[Pair, list[tuple[float, float]]]]
    found = defaultdict(lambda: defaultdict(list))
    for channel, sent, received in _transfers(traces):
        assert received.wait_s is not None
        assert received.leave_s is not None
        if received.leave_s - received.wait_s < WAITED_S:
            continue
        delay_s = max(0.0, received.leave_s - max(sent.enter_s, received.enter_s))
        source, destination = channel.members
        units = max(1.0, received.size_bytes / UNIT_BYTES)
        found[channel.axes][source, destination].append((delay_s, delay_s / units))
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


def _cell(times: Sequence[tuple[float, float]]) -> Cell:
    whole, of_unit = zip(*times, strict=True)
    middle_s, unit_s = statistics.median(whole), statistics.median(of_unit)
    return Cell(middle_s, unit_s, statistics.mean(whole), len(times))


def _is_hot(pair: Pair, cells: Mapping[Pair, Cell]) -> bool:
    """Whether a pair is slower than the others along the axis."""
    others = [cell for other, cell in cells.items() if other != pair]
    if not others:
        return False
    cell = cells[pair]
    usual_s = statistics.median(other.unit_s for other in others)
    return cell.delay_s > HOT_S and cell.unit_s > HOT * usual_s


def _named(axis: str, hot: set[Pair], cells: Mapping[Pair, Cell]) -> Slow:
    """A whole row is a sender, a whole column a receiver, and a single cell a link."""
    kinds: tuple[tuple[int, Literal["slow-sender", "slow-receiver"], str], ...]
    kinds = (0, "slow-sender", "sends"), (1, "slow-receiver", "receives")
    for end, kind, verb in kinds:
        for rank in sorted({pair[end] for pair in hot}):
            own = {pair for pair in cells if pair[end] == rank}
            if len(own) > 1 and own <= hot:
                text = f"all that rank {rank} {verb} along {axis} is slow: {_figures(own, cells)}"
                return Slow(kind, (rank,), text)
    pair = max(hot, key=lambda pair: cells[pair].unit_s)
    text = f"rank {pair[0]} to rank {pair[1]} along {axis} is slow: {_figures({pair}, cells)}"
    return Slow("slow-link", pair, text)


def _figures(slow: set[Pair], cells: Mapping[Pair, Cell]) -> str:
    own_s = statistics.median(cells[pair].unit_s for pair in slow)
    usual_s = statistics.median(c.unit_s for pair, c in cells.items() if pair not in slow)
    unit = f"a unit of {UNIT_BYTES >> 10} KiB"
    return f"{own_s * 1e3:.2f} ms for {unit}, where others take {usual_s * 1e3:.2f} ms"
