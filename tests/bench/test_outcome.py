"""Ratios are of pairs, taken in turns, without the first."""

from __future__ import annotations

import pytest

from paceline.bench.outcome import MIN_PAIRS, interleave, ratio


def test_sides_take_turns_and_the_first_pair_is_thrown_away():
    calls: list[str] = []
    numbers = iter(range(100))

    def side(name: str):
        def measure() -> float:
            calls.append(name)
            return float(next(numbers))

        return measure

    ours, theirs = interleave(side("ours"), side("theirs"))
    assert calls == ["ours", "theirs"] * (MIN_PAIRS + 1)
    assert ours == [2.0 * (n + 1) for n in range(MIN_PAIRS)]
    assert theirs == [2.0 * (n + 1) + 1 for n in range(MIN_PAIRS)]


def test_a_ratio_is_the_median_of_the_pairs_and_not_that_of_the_sides():
    found = ratio([2.0, 30.0, 8.0], [1.0, 10.0, 8.0])
    assert (found.median, found.lowest, found.highest, found.pairs) == (2.0, 1.0, 3.0, 3)


def test_sides_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])
