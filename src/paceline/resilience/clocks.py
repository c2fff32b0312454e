"""One clock for the ranks of several machines, from what ends everywhere at the same time."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from paceline.dist.calls import Call, Channel, RankTrace


def aligned(traces: Sequence[RankTrace]) -> list[RankTrace]:
    """Traces with the times of calls by the clock of the first one's machine.

    Ranks leave a collective within the time that a message takes, whenever they came to it: by how
    much two machines' clocks differ is the median difference of when they left. A machine that has
    left no collective together with the first keeps its clock.
    """
    if len({trace.host for trace in traces}) < 2:
        return list(traces)
    left: defaultdict[tuple[Channel, int], dict[str, float]] = defaultdict(dict)
    for trace in traces:
        for call in trace.calls:
            if call.leave_s is not None and not call.channel.is_way:
                left[call.channel, call.sequence][trace.host] = call.leave_s
    first = traces[0].host
    ahead: defaultdict[str, list[float]] = defaultdict(list)
    for by_host in left.values():
        if first in by_host:
            for host, leave_s in by_host.items():
                ahead[host].append(leave_s - by_host[first])
    offsets = {host: statistics.median(found) for host, found in ahead.items()}
    return [_shifted(trace, offsets.get(trace.host, 0.0)) for trace in traces]


def _shifted(trace: RankTrace, ahead_s: float) -> RankTrace:
    return replace(trace, calls=tuple(_earlier(call, ahead_s) for call in trace.calls))


def _earlier(call: Call, ahead_s: float) -> Call:
    return call._replace(
        enter_s=call.enter_s - ahead_s,
        wait_s=None if call.wait_s is None else call.wait_s - ahead_s,
        leave_s=None if call.leave_s is None else call.leave_s - ahead_s,
    )
