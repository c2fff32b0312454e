"""Every place of a row is on one rank, and every rank has as many."""

from __future__ import annotations

import pytest

from paceline.parallel.context.placement import Placement

PLACEMENTS = [
    Placement(parts, ranks, is_zigzag=is_zigzag)
    for parts in (1, 2, 3, 4)
    for ranks in (1, 2, 3)
    for is_zigzag in (False, True)
]


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("length", [1, 7, 17, 48])
def test_ranks_share_out_every_place(placement, length):
    padded = placement.padded(length)
    assert length <= padded < length + placement.unit
    ranks = [placement.places(rank, padded) for rank in range(placement.num_ranks)]
    sizes = {sum(map(len, ranges)) for ranges in ranks}
    assert sizes == {padded // placement.num_ranks}
    places = sorted(place for ranges in ranks for span in ranges for place in span)
    assert places == list(range(padded))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_the_ranks_of_a_part_have_it_between_them(placement):
    length = 2 * placement.unit
    for index in range(placement.num_parts):
        first = index * placement.ranks_per_part
        members = range(first, first + placement.ranks_per_part)
        found = [p for rank in members for span in placement.places(rank, length) for p in span]
        assert found == [p for chunk in placement.part(index, length) for p in chunk]


def test_a_zigzag_gives_a_rank_an_early_and_a_late_chunk():
    assert Placement(2, is_zigzag=True).places(0, 8) == (range(2), range(6, 8))
    assert Placement(2, is_zigzag=True).places(1, 8) == (range(2, 4), range(4, 6))
    assert Placement(2).places(1, 8) == (range(4, 8),)
    assert Placement(2, 2, is_zigzag=True).places(1, 8) == (range(6, 8),)
