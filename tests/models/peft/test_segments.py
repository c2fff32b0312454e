"""Which rows of a pass belong to which adapter, and how they are computed together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.models.peft.segments import SHORT_ROWS, Segment, Segments

pytestmark = pytest.mark.cpu

NAMES = ("a", "b", "c", "d")
PASSES = st.lists(st.tuples(st.sampled_from(("", *NAMES)), st.integers(1, 40)), max_size=12)


def segments_of(sequences: list[tuple[str, int]]) -> Segments:
    segments = Segments(torch.device("cpu"))
    segments.set([name for name, _ in sequences], [length for _, length in sequences])
    return segments


def test_neighbours_with_one_adapter_are_one_segment():
    segments = segments_of([("", 3), ("a", 1), ("a", 4), ("b", 2)])
    assert segments.num_rows == 10
    assert segments.adapted == (Segment("a", slice(3, 8)), Segment("b", slice(8, 10)))


def test_rows_that_are_torn_apart_are_refused():
    with pytest.raises(AssertionError, match="rows of a do not follow each other"):
        segments_of([("a", 1), ("b", 1), ("a", 1)])


def test_a_new_pass_forgets_the_one_before():
    segments = segments_of([("a", 1), ("b", 1)])
    assert segments.share(("a", "b")).block is not None
    segments.set([""], [5])
    assert (segments.num_rows, segments.adapted) == (5, ())
    assert segments.share(("a", "b")) == ((), None)


def test_long_segments_have_products_of_their_own():
    alone, block = segments_of([("a", SHORT_ROWS + 1), ("b", SHORT_ROWS)]).share(("a", "b"))
    assert alone == ((0, slice(0, SHORT_ROWS + 1)),)
    assert block is not None
    assert block.depth == SHORT_ROWS


def test_few_of_many_have_products_of_their_own():
    """A batch reads every adapter's factors, wanted or not."""
    sequences = [("a", 1), ("b", 1)]
    assert segments_of(sequences).share(NAMES).block is not None
    assert segments_of(sequences).share((*NAMES, "e")) == (
        ((0, slice(0, 1)), (1, slice(1, 2))),
        None,
    )


@settings(deadline=None, max_examples=100)
@given(PASSES, st.lists(st.sampled_from(NAMES), unique=True).map(tuple))
def test_every_row_is_computed_once_with_its_own(sequences, names):
    sequences = sorted(sequences, key=lambda sequence: sequence[0])
    owners = [name for name, length in sequences for _ in range(length)]
    alone, block = segments_of(sequences).share(names)
    computed = [
        (row, names[index]) for index, rows in alone for row in range(rows.start, rows.stop)
    ]
    if block is not None:
        assert len(block.sources) == len(names) * block.depth
        for row, place in zip(block.rows.tolist(), block.places.tolist(), strict=True):
            assert int(block.sources[place]) == row
            computed.append((row, names[place // block.depth]))
    assert sorted(computed) == [(row, name) for row, name in enumerate(owners) if name in names]
