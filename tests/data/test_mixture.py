from __future__ import annotations

from collections import Counter

import pytest

from paceline.core.errors import UsageError
from paceline.data.mixture import MAX_BLOCK, MixtureOrder, block_counts

WEIGHTS = [[1.0], [1.0, 1.0], [0.7, 0.3], [3.0, 2.0, 2.0], [1.0, 2**0.5, 3**0.5], [0.999, 0.001]]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([5.0], (1,)),
        ([1.0, 1.0], (1, 1)),
        ([0.7, 0.3], (7, 3)),
        ([1, 2, 7], (1, 2, 7)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([1 / 3, 1 / 3, 1 / 3], (1, 1, 1)),
        ([0.25, 0.745, 0.005], (50, 149, 1)),
        ([1.0, 2**0.5], (414, 586)),  # of 1000: 414.2 and 585.8
        ([1.0, 1.0, 2**0.5], (293, 293, 414)),  # 292.9, 292.9 and 414.2
    ],
)
def test_a_block_is_the_smallest_in_which_shares_are_whole(weights, counts):
    assert block_counts(weights) == counts


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_block_has_the_shares_and_every_source_its_turns_in_order(weights):
    order, counts = MixtureOrder(weights, 3), block_counts(weights)
    size = sum(counts)
    turns = Counter[int]()
    for block in range(4):
        found = [order.at(place) for place in range(block * size, (block + 1) * size)]
        assert Counter(source for source, _ in found) == dict(enumerate(counts))
        for source, turn in found:
            assert turn == turns[source]
            turns[source] += 1


def test_places_are_read_in_any_order_and_seeds_differ():
    places = range(2345)
    whole = [MixtureOrder([0.6, 0.4], 1).at(place) for place in places]
    backwards = MixtureOrder([0.6, 0.4], 1)
    assert [backwards.at(place) for place in reversed(places)] == whole[::-1]
    assert [MixtureOrder([0.6, 0.4], 2).at(place)[0] for place in places] != [s for s, _ in whole]
    blocks = {tuple(s for s, _ in whole[i : i + 5]) for i in places[:-5:5]}
    assert len(blocks) == 10  # the ways to place 3 of 5: blocks have orders of their own


def test_a_weight_too_small_for_a_block_is_refused():
    with pytest.raises(UsageError, match=f"0.0001 is less than a share of 1 in {MAX_BLOCK}"):
        block_counts([1.0, 0.0001])
