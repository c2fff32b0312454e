"""What a benchmark gives: both sides, the limit, and ratios of interleaved pairs.

Times are compared within one run only. A ratio is the median of at least seven pairs, each taken
one right after the other, and is given with its spread.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from paceline.kernels.device import choose_device, describe

MIN_PAIRS = 7


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over the peer's; above 1 is faster.

    Attributes:
        median: of the pairs.
        lowest: of the pairs.
        highest: of the pairs.
        pairs: how many.
    """

    median: float
    lowest: float
    highest: float
    pairs: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of one claim.

    Attributes:
        name: of the benchmark.
        unit: of `ours`, `peer` and `limit`.
        ours: median of our side.
        peer: median of the peer's side.
        against: the peer and its version.
        limit: what the machine admits, measured in the same run.
        limited_by: what `limit` is made of.
        fraction: ours over the limit.
        ratios: ours over the peer's.
        device: in words.
    """

    name: str
    unit: str
    ours: float
    peer: float
    against: str
    limit: float
    limited_by: str
    fraction: float
    ratios: Ratio
    device: str


def outcome(
    name: str,
    ours: list[float],
    peer: list[float],
    *,
    against: str,
    limit: float,
    limited_by: str,
) -> Outcome:
    """What interleaved rates in tokens per second on this CPU come to.

    Args:
        name: of the benchmark, with its sizes and dtype.
        ours: rates.
        peer: rates, taken in turns with ours.
        against: the peer and its version.
        limit: tokens per second that the machine admits.
        limited_by: what `limit` is made of.
    """
    rate = statistics.median(ours)
    return Outcome(
        name=name,
        unit="tokens/s",
        ours=rate,
        peer=statistics.median(peer),
        against=against,
        limit=limit,
        limited_by=limited_by,
        fraction=rate / limit,
        ratios=ratio(ours, peer),
        device=describe(choose_device("cpu")),
    )


def interleave(
    ours: Callable[[], float], peer: Callable[[], float], pairs: int = MIN_PAIRS
) -> tuple[list[float], list[float]]:
    """Rates of both sides, taken in turns; one pair before is thrown away."""
    for warm_up in (ours, peer):
        warm_up()
    both = [(ours(), peer()) for _ in range(pairs)]
    return [pair[0] for pair in both], [pair[1] for pair in both]


def ratio(ours: list[float], peer: list[float]) -> Ratio:
    """The ratio of interleaved rates."""
    ratios = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))
