"""Moves between random layouts, held against element-wise counts."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from boxes import cuts, shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.checkpoint.overlap import Held, Move, moves, require_cover
from paceline.core.errors import DataError
from paceline.plan.layout import Box, padded_share

HOLDERS = 4


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Held], list[Held]]:
    """A shape, who has what of it (all of it, with copies), and who wants what."""
    shape = draw(shapes)
    whole = Box.of_whole(shape)
    holders = st.sets(st.integers(0, HOLDERS - 1), min_size=1)
    sources = [
        Held("a", holder, box)
        for _ in range(draw(st.integers(1, 2)))  # two ways of cutting overlap
        for box in draw(cuts(whole))
        for holder in sorted(draw(holders))
    ]
    targets = [
        Held("a", holder, box)
        for holder in range(HOLDERS)
        for box in draw(cuts(whole))
        if draw(st.booleans())
    ]
    return shape, draw(st.permutations(sources)), targets


def masks(shape: tuple[int, ...], held: list[Held]) -> dict[int, np.ndarray]:
    """Of each holder, how often it has each element."""
    found = {holder: np.zeros(shape, dtype=int) for holder in range(HOLDERS)}
    for one in held:
        found[one.holder][one.box.slices] += 1
    return found


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_every_wanted_element_comes_once_and_no_more_travel_than_must(drawn):
    shape, sources, targets = drawn
    values = np.arange(math.prod(shape)).reshape(shape)
    had = {one: values[one.box.slices] for one in sources}
    wanted = {one: np.full(one.box.sizes, -1) for one in targets}
    times = {one: np.zeros(one.box.sizes, dtype=int) for one in targets}

    plan = moves(sources, targets)
    for move in plan:
        assert move.box.num_elements
        there = move.box.within(move.target.box)
        wanted[move.target][there] = had[move.source][move.box.within(move.source.box)]
        times[move.target][there] += 1

    for one, found in wanted.items():
        assert np.array_equal(found, values[one.box.slices])
        assert (times[one] == 1).all()
    have, want = masks(shape, sources), masks(shape, targets)
    missing = sum(int(((want[n] > 0) & (have[n] == 0)).sum()) for n in range(HOLDERS))
    assert sum(move.box.num_elements for move in plan if not move.is_local) == missing
    assert moves(sources, targets) == plan


@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_what_nobody_holds_is_an_error_that_names_it(drawn, data):
    shape, sources, targets = drawn
    kept = [one for one in sources if data.draw(st.booleans())]
    have = sum(masks(shape, kept).values()) > 0
    lacking = [one for one in targets if not have[one.box.slices].all()]
    if not lacking:
        moves(kept, targets)
        return
    with pytest.raises(DataError, match=r"a: nobody holds \[.*\] of it"):
        moves(kept, targets)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_cover_is_one_exactly_where_each_element_is_in_one_box(data):
    shape = data.draw(shapes)
    boxes = data.draw(cuts(Box.of_whole(shape)))
    dropped_or_doubled = data.draw(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=len(boxes)))
    chosen = [b for b, n in zip(boxes, dropped_or_doubled, strict=False) for _ in range(n)]
    times = np.zeros(shape, dtype=int)
    for box in chosen:
        times[box.slices] += 1
    if (times == 1).all():
        require_cover("a", shape, chosen)
        return
    why = "is there twice" if (times > 1).any() else "nobody holds"
    with pytest.raises(DataError, match=f"a: .*{why}"):
        require_cover("a", shape, chosen)


def test_a_box_outside_the_tensor_is_an_error():
    for box in (Box((3,), (2,)), Box((0, 0), (4, 1))):
        with pytest.raises(DataError, match=r"lies outside its shape \[4\]"):
            require_cover("a", (4,), [box])


def test_the_least_loaded_gives():
    """Three ranks have all of every tensor, and a fourth wants all of them."""
    whole = Box.of_whole((2, 5))
    names = [f"t{n}" for n in range(7)]
    sources = [Held(name, rank, whole) for name in names for rank in (2, 0, 1)]
    plan = moves(sources, [Held(name, 3, whole) for name in names])
    assert [move.source.holder for move in plan] == [0, 1, 2, 0, 1, 2, 0]
    mine = moves(sources, [Held(name, 1, whole) for name in names])
    assert {move.source.holder for move in mine} == {1}
    assert all(move.is_local for move in mine)


def test_an_unknown_tensor_is_an_error_unless_nothing_of_it_is_wanted():
    box = Box.of_whole((3,))
    with pytest.raises(DataError, match=r"b: nobody holds \[0:3\] of it"):
        moves([Held("a", 0, box)], [Held("b", 0, box)])
    assert moves([], [Held("b", 0, box.narrowed(0, range(0)))]) == ()


def test_thousands_of_boxes_take_no_time():
    """A model of 272 tensors and two moments of each, from the rows of 16 ranks to 12."""
    shape = (576, 192)
    names = [f"t{n}" for n in range(3 * 272)]

    def rows(num_ranks: int) -> list[Held]:
        shares = [padded_share(shape[0], num_ranks, rank) for rank in range(num_ranks)]
        whole = Box.of_whole(shape)
        return [
            Held(name, rank, whole.narrowed(0, share))
            for name in names
            for rank, share in enumerate(shares)
        ]

    start_s = time.perf_counter()
    plan = moves(rows(16), rows(12))
    time_s = time.perf_counter() - start_s
    assert time_s < 5, time_s  # half a second on an idle core
    counted: Counter[str] = Counter()
    for move in plan:
        counted[move.tensor] += move.box.num_elements
    assert set(counted.values()) == {math.prod(shape)}


def test_one_long_list_of_boxes_is_not_compared_all_with_all():
    boxes = [Box((0, 3 * n), (7, 3)) for n in range(20_000)]
    start_s = time.perf_counter()
    require_cover("a", (7, 60_000), boxes)
    wanted = [Held("a", 1, Box((1, 6 * n), (2, 6))) for n in range(9)]
    plan = moves([Held("a", 0, box) for box in boxes], wanted)
    assert time.perf_counter() - start_s < 5  # all pairs take minutes
    assert len(plan) == 18


def by_holder(plan: tuple[Move, ...]) -> dict[int, int]:
    found: defaultdict[int, int] = defaultdict(int)
    for move in plan:
        found[move.source.holder] += move.box.num_elements
    return dict(found)


def test_many_takers_share_out_the_givers():
    whole = Box.of_whole((8, 8))
    sources = [Held("a", rank, whole) for rank in range(2)]
    targets = [Held("a", 2 + n, whole.narrowed(0, range(2 * n, 2 * n + 2))) for n in range(4)]
    assert by_holder(moves(sources, targets)) == {0: 32, 1: 32}
