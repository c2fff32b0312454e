"""Random ways to cut tensors, for tests of what moves between layouts."""

from __future__ import annotations

from hypothesis import strategies as st

from paceline.plan.layout import Box

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, box: Box, depth: int = 3) -> list[Box]:
    """A box cut into boxes that cover it, some of them empty."""
    if depth == 0 or not box.sizes or draw(st.booleans()):
        return [box]
    dim = draw(st.integers(0, len(box.sizes) - 1))
    at = draw(st.integers(0, box.sizes[dim]))
    low, high = box.narrowed(dim, range(at)), box.narrowed(dim, range(at, box.sizes[dim]))
    return draw(cuts(low, depth - 1)) + draw(cuts(high, depth - 1))
