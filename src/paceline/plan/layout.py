"""Where the part of a tensor that a rank has lies in the whole. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor.

    Attributes:
        offsets: where it begins in each dimension of the whole.
        sizes: how large it is in each dimension; 0 in one of them makes it empty.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of_whole(cls, shape: tuple[int, ...]) -> Box:
        """The box that is all of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts the box out of the whole."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def narrowed(self, dim: int, span: range) -> Box:
        """The part of it whose places along a dimension, counted from its own start, are `span`."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim] += span.start
        sizes[dim] = len(span)
        return Box(tuple(offsets), tuple(sizes))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """What cuts the box out of a tensor that has the part `outer`, which encloses it."""
        starts = [mine - theirs for mine, theirs in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(o, o + s) for o, s in zip(starts, self.sizes, strict=True))

    def meet(self, other: Box) -> Box:
        """The part that two boxes share; empty where they share nothing."""
        starts = [max(pair) for pair in zip(self.offsets, other.offsets, strict=True)]
        ends = [min(pair) for pair in zip(self._ends, other._ends, strict=True)]
        sizes = [max(0, end - start) for start, end in zip(starts, ends, strict=True)]
        return Box(tuple(starts), tuple(sizes))

    def minus(self, other: Box) -> tuple[Box, ...]:
        """What is left of it without what it shares with another: boxes that do not overlap."""
        shared = self.meet(other)
        if not shared.num_elements:
            return (self,) if self.num_elements else ()
        parts: list[Box] = []
        core = self
        for dim, (start, size) in enumerate(zip(shared.offsets, shared.sizes, strict=True)):
            before = start - core.offsets[dim]
            end = before + size
            for span in (range(before), range(end, core.sizes[dim])):
                if span:
                    parts.append(core.narrowed(dim, span))
            core = core.narrowed(dim, range(before, end))
        return tuple(parts)

    def __str__(self) -> str:
        spans = zip(self.offsets, self._ends, strict=True)
        return f"[{', '.join(f'{start}:{end}' for start, end in spans)}]"

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class Place:
    """What a rank has of a tensor that is spread over ranks.

    Attributes:
        shape: of the whole tensor.
        box: what this rank has.
        owned: the part of `box` for which this rank stands where each element must count once:
            among the ranks that differ on the axes over which the tensor is spread, every element
            has one owner. Ranks of other axes are replicas and own the same.
    """

    shape: tuple[int, ...]
    box: Box
    owned: Box

    @classmethod
    def of_whole(cls, shape: tuple[int, ...]) -> Place:
        """A tensor that is not spread."""
        box = Box.of_whole(shape)
        return cls(tuple(shape), box, box)

    def rows(self, span: range) -> Place:
        """What is left to a rank that keeps some rows of `box`, counted from its start."""
        box = self.box.narrowed(0, span)
        return replace(self, box=box, owned=self.owned.meet(box))

    def disowned(self) -> Place:
        """The same of a rank that holds a copy for which another stands."""
        return replace(self, owned=Box(self.box.offsets, (0,) * len(self.shape)))


def padded_share(size: int, num_parts: int, index: int) -> range:
    """The places that a part has if all but the last parts have ``ceil(size / num_parts)``.

    Parts of that length fit collectives that want equal ones; the last of them may be empty.
    """
    length = -(-size // num_parts)
    return range(min(size, index * length), min(size, (index + 1) * length))
