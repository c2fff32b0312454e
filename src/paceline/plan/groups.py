"""Groups of linears that are split together: found in a graph, cut into parts, shared out.

A group is closed: what its columns give is read by its rows alone, whose outputs are summed. It is
cut where no row of a source is read from both sides, or, between query heads that share a key head,
where the copies are few.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

from paceline.core.errors import ConfigError, Problem
from paceline.plan.module_graph import Leaf, Link, ModuleGraph, Span
from paceline.plan.module_rules import Draft, Group, even_shares
from paceline.plan.tensor_rules import Split, even_share


def components(graph: ModuleGraph) -> list[tuple[list[Leaf], list[Leaf]]]:
    """Linears that read linears, with those: (sources, readers) that hang together.

    The largest come first: a linear can be in two, as a reader in one and as a source in the
    other, of which it is split in one.
    """
    return sorted(_components(graph), key=lambda pair: -_num_parameters((*pair[0], *pair[1])))


def _num_parameters(leaves: Iterable[Leaf]) -> int:
    return sum(leaf.num_inputs * leaf.num_outputs for leaf in leaves)


def _components(graph: ModuleGraph) -> Iterator[tuple[list[Leaf], list[Leaf]]]:
    linear = {leaf.name for leaf in graph.leaves if leaf.is_linear}

    def linear_sources(leaf: Leaf) -> set[str]:
        return {link.source for link in leaf.links} & linear

    remaining = [leaf for leaf in graph.leaves if leaf.is_linear and linear_sources(leaf)]
    while remaining:
        rows = [remaining.pop(0)]
        sources = linear_sources(rows[0])
        while more := [leaf for leaf in remaining if sources & linear_sources(leaf)]:
            rows += more
            remaining = [leaf for leaf in remaining if leaf not in more]
            sources |= {name for leaf in more for name in linear_sources(leaf)}
        yield [leaf for leaf in graph.leaves if leaf.name in sources], rows


def split_group(draft: Draft, columns: list[Leaf], rows: list[Leaf]) -> str:
    """Splits a group, or says why it is whole."""
    if reason := _why_open(draft, columns, rows):
        return reason
    links = [link for leaf in rows for link in leaf.links]
    linear = {leaf.name for leaf in columns}
    own = [link for link in links if link.source in linear]
    heads = max((link for link in links if _is_block(link)), key=_num_cuts, default=None)
    units = _clean_cuts([*own, heads] if heads else own, rows[0].num_inputs)
    parts = _clean_cuts([heads], rows[0].num_inputs) if heads else units
    if len(parts) < 2:
        mixed = sorted({name for link in links for name in link.through})
        return f"{' and '.join(mixed) or 'what lies between'} mixes all of its input's features"
    shares = _shared_out(draft, rows[0], parts, units, heads is not None)
    if shares is None:
        return f"it has {len(parts)} features for {draft.tp} ranks"
    for leaf in columns:
        num_read = len(_indices(links, leaf.name, range(rows[0].num_inputs)))
        if num_read < leaf.num_outputs:
            return f"{leaf.num_outputs - num_read} outputs of {leaf.name} are read by nothing"
    taken = sorted({link.source for link in links} - linear)
    for leaf in columns:
        draft.split_outputs(leaf, tuple(_rows_of(links, leaf.name, share) for share in shares))
        draft.roles[leaf.name] = "column"
    for leaf in rows:
        split = Split(1 - leaf.output_dim, tuple((share,) for share in shares))
        draft.splits[f"{leaf.name}.weight"] = split
        draft.roles[leaf.name] = "row"
    for name in taken:
        draft.taken[name] = Split(-1, tuple(_rows_of(links, name, share) for share in shares))
        draft.roles[name] = "taken"
        _split_behind(draft, draft.leaves[name], draft.taken[name])
    for leaf in draft.graph.leaves:
        if leaf.is_passed and any(link.source in (*linear, *taken) for link in leaf.links):
            draft.roles[leaf.name] = "inside"
    names = (tuple(leaf.name for leaf in columns), tuple(leaf.name for leaf in rows), tuple(taken))
    draft.groups.append(Group(*names, len(parts), len(units), heads is not None))
    return ""


def _split_behind(draft: Draft, taken: Leaf, split: Split) -> None:
    """The linear that a norm of all heads reads alone: split, and gathered for the norm."""
    sources = {link.source for link in taken.links}
    leaf = draft.leaves.get(min(sources)) if len(sources) == 1 else None
    if leaf is None or not leaf.is_linear or leaf.name in draft.roles or draft.is_bound(leaf):
        return
    readers = [other for other in draft.graph.leaves if sources & {k.source for k in other.links}]
    if readers != [taken] or leaf.name in draft.graph.outputs or leaf.num_outputs < draft.tp:
        return
    is_plain = not split.copied and [len(share) for share in split.shares] == [1] * draft.tp
    draft.split_outputs(leaf, split.shares if is_plain else even_shares(leaf.num_outputs, draft.tp))
    draft.roles[leaf.name] = "gathered"


def _why_open(draft: Draft, columns: list[Leaf], rows: list[Leaf]) -> str:
    """Why a group cannot be split: what it gives is read elsewhere too, or it is bound."""
    row_names = {leaf.name for leaf in rows}
    for leaf in (*columns, *rows):
        if leaf.name in draft.roles:
            return f"{leaf.name} is split otherwise"
        if why := draft.is_bound(leaf):
            return why
    if len({leaf.num_inputs for leaf in rows}) > 1:
        return f"{' and '.join(sorted(row_names))} read inputs of different widths"
    sources = {link.source for leaf in rows for link in leaf.links}
    for source in sorted(sources):
        if source not in draft.leaves:
            return f"it is made from {source or 'the residual stream'} too"
        if source in draft.graph.outputs:
            return f"the model's output is made from {source} too"
        if source in draft.graph.mixed:
            return f"{source} is read as a whole too"
        for leaf in draft.graph.leaves:
            reads = any(link.source == source for link in leaf.links)
            if reads and leaf.name not in row_names:
                if not leaf.is_passed:
                    return f"{leaf.name} reads {source} too"
                if why := draft.is_bound(leaf):
                    return f"{leaf.name} reads {source} too, and {why}"
        if source in row_names:
            return f"{source} is among its own readers"
        if draft.leaves[source].num_calls > 1:
            return f"{source} is called {draft.leaves[source].num_calls} times in one pass"
        if draft.leaves[source].kind == "embedding":
            return f"it reads {source}"
    return ""


def _is_block(link: Link) -> bool:
    return any(not span.is_each and len(span.rows) > 1 for span in link.spans)


def _clean_cuts(links: list[Link], num_columns: int) -> list[range]:
    """The finest parts of an input such that no row is read from two of them."""
    allowed = set(range(1, num_columns))
    for link in links:
        allowed &= _cuts(link)
    return [range(first, last) for first, last in pairwise([0, *sorted(allowed), num_columns])]


def _num_cuts(link: Link) -> int:
    return len(_cuts(link))


def _cuts(link: Link) -> set[int]:
    """Columns before which a cut parts no row from itself; rows must ascend with columns."""
    cuts: set[int] = set()
    highest = -1
    lowest_after = _lowest_after(link.spans)
    end = 0
    for span, later in zip(link.spans, lowest_after, strict=True):
        if highest < min(span.rows.start, later):
            cuts |= set(range(end, span.columns.start + 1))  # columns between read nothing
        if span.is_each:
            inner = zip(span.columns[1:], span.rows, span.rows[1:], strict=False)
            cuts |= {n for n, last, row in inner if max(highest, last) < min(row, later)}
        highest = max(highest, span.rows[-1])
        end = span.columns.stop
    return cuts


def _lowest_after(spans: tuple[Span, ...]) -> list[int]:
    """For each span the lowest row that a later one reads."""
    lowest: list[int] = []
    low = max(span.rows[-1] for span in spans) + 1
    for span in reversed(spans):
        lowest.append(low)
        low = min(low, span.rows.start)
    return lowest[::-1]


def _shared_out(
    draft: Draft, row: Leaf, parts: list[range], units: list[range], is_heads: bool
) -> list[range] | None:
    """Columns of each rank; None where there are too few features.

    Raises:
        ConfigError: heads that cannot be shared out evenly.
    """
    tp = draft.tp
    if not is_heads:
        return None if len(parts) < tp else _joined(parts, tp)
    num_parts, num_units = len(parts), len(units)
    if num_units % tp == 0:
        return _joined(units, tp)
    if num_parts % tp == 0 and tp % num_units == 0:
        return _joined(parts, tp)
    legal = [
        n
        for n in range(1, num_parts + 1)
        if num_units % n == 0 or (num_parts % n == 0 and n % num_units == 0)
    ]
    heads = f"{num_parts} heads" + (f" on {num_units} key heads" if num_units < num_parts else "")
    rule = f"does not share out the {heads} that {row.name} reads"
    near = sorted(legal, key=lambda n: (abs(n - tp), n))[:2]
    hint = f"use {' or '.join(map(str, sorted(near)))}"
    raise ConfigError([Problem("mesh.tp", str(tp), rule, hint)], source="the plan")


def _joined(parts: list[range], tp: int) -> list[range]:
    shares = [even_share(len(parts), tp, rank) for rank in range(tp)]
    return [range(parts[share[0]].start, parts[share[-1]].stop) for share in shares]


def _indices(links: list[Link], source: str, columns: range) -> set[int]:
    """Rows of a source that some columns read."""
    spans = [span for link in links if link.source == source for span in link.spans]
    return {row for span in spans for row in span.clipped(columns)}


def _rows_of(links: list[Link], source: str, columns: range) -> tuple[range, ...]:
    """Rows of a source that some columns read, as few ranges as there can be."""
    rows = sorted(_indices(links, source, columns))
    starts = [n for n, row in enumerate(rows) if n == 0 or row != rows[n - 1] + 1]
    stops = [*starts[1:], len(rows)]
    return tuple(
        range(rows[first], rows[last - 1] + 1) for first, last in zip(starts, stops, strict=True)
    )
