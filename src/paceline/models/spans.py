"""The provenance of a layer's input as plain data: spans of columns and the rows they read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from paceline.models.provenance import Provenance
from paceline.plan.module_graph import Link, Span


def links_of(provenance: Provenance) -> list[Link]:
    links: list[Link] = []
    for (source, _), rows in provenance.items():
        dims = tuple(range(rows.low.dim() - 1))
        low = rows.low.amin(dims) if dims else rows.low
        high = rows.high.amax(dims) if dims else rows.high
        spans = tuple(_spans(low.cpu().numpy(), high.cpu().numpy()))
        links.append(Link(source, spans, tuple(sorted(rows.through))))
    return links


def _spans(low: np.ndarray, high: np.ndarray) -> Iterator[Span]:
    """Columns in as few spans as there can be; columns that read nothing are in none."""
    step = np.diff(low)
    is_single = low == high
    # Runs of single rows that ascend evenly, and runs of equal ranges.
    is_each = is_single[1:] & is_single[:-1] & (step > 0)
    is_equal = (step == 0) & (np.diff(high) == 0)
    first = 0
    while first < len(low):
        last = first
        if last < len(step) and is_each[last]:
            pace = step[last]
            ends = np.flatnonzero(~is_each[last:] | (step[last:] != pace))
            last += int(ends[0]) if len(ends) else len(step) - last
            rows = range(int(low[first]), int(low[last]) + 1, int(pace))
            yield Span(range(first, last + 1), rows, True)
        else:
            ends = np.flatnonzero(~is_equal[last:])
            last += int(ends[0]) if len(ends) else len(step) - last
            if low[first] <= high[first]:
                is_one = first == last and bool(is_single[first])
                rows = range(int(low[first]), int(high[first]) + 1)
                yield Span(range(first, last + 1), rows, is_one)
        first = last + 1
