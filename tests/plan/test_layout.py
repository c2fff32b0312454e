from __future__ import annotations

import pytest

from paceline.plan.layout import Box, Place, padded_share


def test_a_box_is_cut_out_of_the_whole_and_out_of_a_part():
    box = Box.of_whole((6, 5)).narrowed(0, range(2, 5)).narrowed(1, range(1, 3))
    assert box == Box((2, 1), (3, 2))
    assert box.num_elements == 6
    assert box.slices == (slice(2, 5), slice(1, 3))
    assert box.narrowed(0, range(1, 3)).within(box) == (slice(1, 3), slice(0, 2))


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (Box((0,), (4,)), Box((2,), (2,))),
        (Box((3,), (1,)), Box((3,), (1,))),
        (Box((5,), (3,)), Box((5,), (0,))),
        (Box((9,), (3,)), Box((9,), (0,))),
    ],
)
def test_boxes_meet(other, shared):
    assert Box((2,), (3,)).meet(other) == shared


@pytest.mark.parametrize(
    ("other", "left"),
    [
        (Box((0, 0), (9, 9)), ()),
        (Box((5, 0), (2, 9)), (Box((2, 3), (2, 4)),)),
        (Box((2, 3), (0, 4)), (Box((2, 3), (2, 4)),)),
        (Box((3, 4), (9, 2)), (Box((2, 3), (1, 4)), Box((3, 3), (1, 1)), Box((3, 6), (1, 1)))),
    ],
)
def test_a_box_without_another(other, left):
    assert Box((2, 3), (2, 4)).minus(other) == left
    assert sum(box.num_elements for box in left) == 8 - Box((2, 3), (2, 4)).meet(other).num_elements


def test_scalars_are_boxes_too():
    scalar = Box.of_whole(())
    assert scalar.num_elements == 1
    assert scalar.meet(scalar) == scalar
    assert scalar.minus(scalar) == ()


def test_a_box_is_written_as_its_slices():
    assert str(Box((2, 3), (2, 4))) == "[2:4, 3:7]"


def test_rows_of_a_place_own_what_they_share_with_it():
    place = Place((8, 2), Box((2, 0), (4, 2)), Box((3, 0), (3, 2)))
    rows = place.rows(range(2))
    assert rows == Place((8, 2), Box((2, 0), (2, 2)), Box((3, 0), (1, 2)))
    assert place.disowned().owned.num_elements == 0
    assert place.disowned().box == place.box


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize("num_parts", range(1, 6))
def test_padded_shares_cover_a_dimension_in_order(size, num_parts):
    shares = [padded_share(size, num_parts, index) for index in range(num_parts)]
    assert [place for share in shares for place in share] == list(range(size))
    assert max(len(share) for share in shares) == -(-size // num_parts)
