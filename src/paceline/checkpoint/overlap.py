"""Which part of a tensor goes from where to where, however both sides have cut it. Pure arithmetic.

A layout is a set of boxes, each of them had by someone: a chunk of a file, or a rank. Loading a
checkpoint, laying a model over other ranks and giving a server new weights are one problem: of
every box that is wanted, find those that hold it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from paceline.core.errors import DataError
from paceline.plan.layout import Box


class Held(NamedTuple):
    """A box of a tensor that somebody has, or wants.

    Attributes:
        tensor: its name.
        holder: a rank, or the number of a chunk in a file.
        box: where it lies in the whole.
    """

    tensor: str
    holder: int
    box: Box


class Move(NamedTuple):
    """A part of a tensor that goes from a box that is had to one that is wanted.

    Attributes:
        source: what is read.
        target: what is filled; of the same holder where nothing has to travel.
        box: the part of both that is moved.
    """

    source: Held
    target: Held
    box: Box

    @property
    def tensor(self) -> str:
        return self.source.tensor

    @property
    def is_local(self) -> bool:
        """Whether a holder copies what it has itself."""
        return self.source.holder == self.target.holder


def moves(sources: Iterable[Held], targets: Iterable[Held]) -> tuple[Move, ...]:
    """How every target is filled, each of its elements once.

    What a target's holder has itself it copies. Of others that hold an element, the one that has
    given the fewest elements so far gives it, and of several of these the lowest; so what travels
    is as little as can be, and nobody gives all of it. It depends on nothing but the order of the
    targets, so every rank plans the same.

    With S sources and T targets of a tensor, sorted along the dimension in which sources begin at
    the most places, it takes time S log S and, for a target, log S and the sources whose span along
    that dimension meets its own.

    Args:
        sources: what is there; copies of the same elements are welcome.
        targets: what is wanted; those of one holder do not overlap.

    Raises:
        DataError: nobody has an element that is wanted; names the tensor and the place.
    """
    shelves = {name: _Shelf(held) for name, held in _by_tensor(sources).items()}
    given: defaultdict[int, int] = defaultdict(int)
    found: list[Move] = []
    for target in targets:
        left = [target.box] if target.box.num_elements else []
        near = shelves[target.tensor].near(target.box) if target.tensor in shelves else []
        while left:
            rest = left.pop()
            source = _choose(rest, near, target.holder, given)
            if source is None:
                raise DataError(f"{target.tensor}: nobody holds {rest} of it")
            move = Move(source, target, rest.meet(source.box))
            if not move.is_local:
                given[source.holder] += move.box.num_elements
            found.append(move)
            left += rest.minus(move.box)
    return tuple(found)


def require_cover(tensor: str, shape: tuple[int, ...], boxes: Iterable[Box]) -> None:
    """Raises unless every element of a tensor is in one of the boxes, and in one alone.

    Boxes are compared with those that they meet along the dimension in which they begin at the
    most places, not all with all.

    Args:
        tensor: its name, for the error.
        shape: of the whole.
        boxes: empty ones count for nothing.

    Raises:
        DataError: a part that no box covers, that two do, or that lies outside the tensor.
    """
    whole = Box.of_whole(shape)
    boxes = [box for box in boxes if box.num_elements]
    for box in boxes:
        if len(box.sizes) != len(shape) or box.meet(whole) != box:
            raise DataError(f"{tensor}: the part {box} lies outside its shape {list(shape)}")
    for one, other in meeting(boxes):
        raise DataError(f"{tensor}: {one.meet(other)} is there twice, in {one} and in {other}")
    if sum(box.num_elements for box in boxes) != whole.num_elements:
        left = [whole]
        for box in boxes:
            left = [rest for part in left for rest in part.minus(box)]
        raise DataError(f"{tensor}: nobody holds {left[0]} of it")


def meeting(boxes: Sequence[Box]) -> Iterable[tuple[Box, Box]]:
    """Pairs of boxes that have an element in common."""
    dim = _widest(boxes)
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: _span(box, dim).start):
        start = _span(box, dim).start
        open_boxes = [other for other in open_boxes if _span(other, dim).stop > start]
        yield from ((other, box) for other in open_boxes if other.meet(box).num_elements)
        open_boxes.append(box)


def _by_tensor(held: Iterable[Held]) -> dict[str, list[Held]]:
    found: defaultdict[str, list[Held]] = defaultdict(list)
    for one in held:
        if one.box.num_elements:
            found[one.tensor].append(one)
    return found


def _choose(
    wanted: Box, near: Sequence[Held], holder: int, given: defaultdict[int, int]
) -> Held | None:
    """Who gives the next part of what is wanted."""
    able = [held for held in near if held.box.meet(wanted).num_elements]
    return min(
        able,
        key=lambda held: (held.holder != holder, given[held.holder], held.holder),
        default=None,
    )


class _Shelf:
    """The sources of one tensor, sorted so that those near a box are found fast.

    Args:
        held: at least one, none of them empty.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        self._dim = _widest([one.box for one in held])
        self._held = sorted(held, key=lambda one: _span(one.box, self._dim).start)
        spans = [_span(one.box, self._dim) for one in self._held]
        self._starts = [span.start for span in spans]
        # How far the sources up to each reach; it never falls, so it can be searched as well.
        self._reach = list(accumulate((span.stop for span in spans), max))

    def near(self, box: Box) -> Sequence[Held]:
        """Those that may meet a box, and few others."""
        span = _span(box, self._dim)
        first = bisect_right(self._reach, span.start)
        return self._held[first : bisect_left(self._starts, span.stop)]


def _widest(boxes: Sequence[Box]) -> int:
    """The dimension in which boxes begin at the most places."""
    num_dims = len(boxes[0].sizes) if boxes else 0
    starts = [len({box.offsets[dim] for box in boxes}) for dim in range(num_dims)]
    return starts.index(max(starts)) if starts else 0


def _span(box: Box, dim: int) -> range:
    """Where a box lies along a dimension; a scalar is at its one place."""
    if not box.sizes:
        return range(1)
    return range(box.offsets[dim], box.offsets[dim] + box.sizes[dim])
