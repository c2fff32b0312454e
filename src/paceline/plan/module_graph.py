"""What a module computes, as far as splitting it goes: which outputs each input is made from.

A *leaf* is a module that holds parameters. For every column of a linear leaf's input the graph
says which rows of which earlier leaves' outputs it is computed from, whatever operations lie
between. Heads, gates and fused projections need no names: they show in those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LeafKind = Literal["linear", "transposed", "embedding", "other"]


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring columns of an input, and the rows of a source that they are made from.

    Attributes:
        columns: of the input.
        rows: of the source's output.
        is_each: whether the n-th column is made from the n-th row alone; else every column may
            be made from all of the rows.
    """

    columns: range
    rows: range
    is_each: bool

    def clipped(self, columns: range) -> range:
        """The rows that those of its columns read which lie in a range."""
        first = max(self.columns.start, columns.start) - self.columns.start
        last = min(self.columns.stop, columns.stop) - self.columns.start
        if first >= last:
            return self.rows[:0]
        return self.rows[first:last] if self.is_each else self.rows


@dataclass(frozen=True, slots=True)
class Link:
    """One way from a leaf's output to another leaf's input.

    Attributes:
        source: name of the leaf whose output it is.
        spans: in order of columns.
        through: operations on the way that mix features.
    """

    source: str
    spans: tuple[Span, ...]
    through: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leaf:
    """A module with parameters, as one call of the model has met it.

    Attributes:
        name: its path.
        kind: ``x W^T + b``, ``x W + b``, a look-up of rows, or anything else.
        shapes: of its parameters, by their names in it.
        links: what its input is made from.
        num_calls: in one call of the model.
        reads_tokens: whether what it looks up are the model's tokens.
        is_passed: whether it keeps apart what is apart in its input, as a norm of each head does.
    """

    name: str
    kind: LeafKind
    shapes: Mapping[str, tuple[int, ...]]
    links: tuple[Link, ...] = ()
    num_calls: int = 1
    reads_tokens: bool = False
    is_passed: bool = False

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "transposed")

    @property
    def num_outputs(self) -> int:
        """Rows of a linear leaf or words of an embedding."""
        return self.shapes["weight"][self.output_dim]

    @property
    def num_inputs(self) -> int:
        """Columns of a linear leaf."""
        return self.shapes["weight"][1 - self.output_dim]

    @property
    def output_dim(self) -> int:
        """The dimension of its weight that its output has."""
        return 1 if self.kind == "transposed" else 0


@dataclass(frozen=True, slots=True)
class ModuleGraph:
    """A model as one call has met it.

    Attributes:
        leaves: in the order of their first calls.
        outputs: leaves whose outputs reach the model's with no other leaf between.
        tied: names of parameters that are one, for each of which there are several.
        direct: parameters that are used outside the leaf that holds them.
        mixed: leaves whose output is read as a whole, as norms read the residual stream.
    """

    leaves: tuple[Leaf, ...]
    outputs: frozenset[str] = frozenset()
    tied: tuple[tuple[str, ...], ...] = ()
    direct: frozenset[str] = frozenset()
    mixed: frozenset[str] = frozenset()
