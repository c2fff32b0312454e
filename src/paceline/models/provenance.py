"""Which features a tensor's elements are made from, followed through the functions of torch.

For each tensor there is, beside it, for each source (the output of a layer) the lowest and the
highest row of the source that each element is made from. `paceline.models.follow` says how they go
from tensor to tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[str, int]
"""A source, and a number: rows that reach an element on several ways have a range for each."""

NOTHING = torch.iinfo(torch.int32).max
_MAX_WAYS = 8


class Rows(NamedTuple):
    """Rows of a source for each element of a tensor; none where low is above high.

    Attributes:
        low: the lowest, int32, of the tensor's shape.
        high: the highest.
        through: functions on the way that have mixed rows.
    """

    low: Tensor
    high: Tensor
    through: frozenset[str] = frozenset()


Provenance = dict[Key, Rows]


WHOLE = ""
"""The source of what is made from so much that nobody needs to know from what."""


def whole_rows(tensor: Tensor) -> Provenance:
    """The provenance of a tensor of which only that is known that a model has made it."""
    none = torch.zeros((), dtype=torch.int32, device=tensor.device).expand(tensor.shape)
    return {(WHOLE, 0): Rows(none, none)}


def source_rows(name: str, tensor: Tensor) -> Provenance:
    """The provenance of a source's own output: every feature is its own row."""
    last = torch.arange(tensor.shape[-1], dtype=torch.int32, device=tensor.device)
    rows = last.expand(tensor.shape)
    return {(name, 0): Rows(rows, rows)}


def mixed_in(there: Provenance, written: Provenance, shape: torch.Size) -> Provenance:
    """The provenance of a tensor of which some elements, who knows which, are written."""
    return joined_rows([there, everywhere([written], "a write in place")], shape) or {}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_in(part)


def joined_rows(parts: Iterable[Provenance], shape: torch.Size) -> Provenance | None:
    """The union, element by element; None where shapes do not fit."""
    joined: Provenance = {}
    for part in parts:
        for (source, _), rows in part.items():
            try:
                low, high = rows.low.broadcast_to(shape), rows.high.broadcast_to(shape)
            except RuntimeError:
                return None
            _add(joined, source, Rows(low, high, rows.through))
    return joined


def _add(joined: Provenance, source: str, rows: Rows) -> None:
    for way in range(_MAX_WAYS):
        there = joined.get((source, way))
        if there is None:
            joined[source, way] = rows
            return
        if torch.equal(there.low, rows.low) and torch.equal(there.high, rows.high):
            joined[source, way] = there._replace(through=there.through | rows.through)
            return
    first = joined[source, 0]
    low, high = first.low.minimum(rows.low), first.high.maximum(rows.high)
    joined[source, 0] = Rows(low, high, first.through | rows.through | {"many ways"})


def widened(provenance: Provenance, dims: tuple[int, ...], name: str) -> Provenance:
    """Every element made from all along some dimensions, which keep one element."""
    return {
        key: Rows(
            rows.low.amin(dims, keepdim=True),
            rows.high.amax(dims, keepdim=True),
            rows.through | {name},
        )
        for key, rows in provenance.items()
    }


def everywhere(parts: Iterable[Provenance], name: str) -> Provenance:
    """What any element is made from, without a shape."""
    found: dict[str, Rows] = {}
    for part in parts:
        for (source, _), rows in part.items():
            if rows.low.numel() == 0:
                continue
            there = found.get(source)
            low, high, through = rows.low.min(), rows.high.max(), rows.through | {name}
            if there is not None:
                low, high = low.minimum(there.low), high.maximum(there.high)
                through |= there.through
            found[source] = Rows(low, high, through)
    return {(source, 0): rows for source, rows in found.items()}
