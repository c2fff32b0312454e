"""Tensors from one layout to another in memory, from ranks that have them to ranks that want them.

As a checkpoint's way over disk, without the disk: a run that goes on under another plan, or a
server that gets a trainer's new weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from paceline.checkpoint.overlap import Held, Move, moves
from paceline.checkpoint.reader import dtype_name
from paceline.core.errors import DataError
from paceline.dist.world import World
from paceline.optim.parts import NamedParts, Part, named_parts
from paceline.plan.layout import Box

PURPOSE = "relay"
BUFFER_BYTES = 1 << 26


class _Known(NamedTuple):
    """What all ranks know of one part of one of them."""

    tensor: str
    box: Box
    shape: tuple[int, ...]
    dtype: str


@torch.no_grad()
def relay(
    before: NamedParts,
    after: NamedParts,
    world: World,
    *,
    purpose: str = PURPOSE,
    buffer_bytes: int = BUFFER_BYTES,
) -> None:
    """Fills parts of tensors in place with what ranks have of them; called by every rank.

    Ranks tell each other once what they have and want, and plan alike (`overlap.moves`): what a
    rank has itself it copies, and of what it lacks each element travels to it once.

    Args:
        before: what this rank has; may be nothing, as on a rank that only serves.
        after: what it wants filled; may be nothing, as on a rank that only trains. In other memory
            than `before`.
        world: the ranks of both layouts, on one kind of device.
        purpose: written down with the bytes that leave this rank.
        buffer_bytes: that a rank sends at a time, and that it gets, or one row of a tensor where
            that is more; packing and unpacking take as much again.

    Raises:
        DataError: a part that nobody has, or a tensor that ranks take for different ones; on all
            ranks, before anything is filled.

    Comm: the bytes that each rank lacks, to it, in as many exchanges of all ranks as the fullest
        buffer needs.
    """
    before, after = named_parts(before), named_parts(after)
    told = world.collect(([_known(*pair) for pair in before], [_known(*pair) for pair in after]))
    of_tensor = _require_alike(told)
    sources = [Held(k.tensor, rank, k.box) for rank, (has, _) in enumerate(told) for k in has]
    targets = [Held(k.tensor, rank, k.box) for rank, (_, wants) in enumerate(told) for k in wants]
    plan = moves(sources, targets)
    have, want = _by_place(before, world.rank), _by_place(after, world.rank)
    for move in plan:
        if move.is_local and move.source.holder == world.rank:
            _cut(want[move.target], move, move.target).copy_(
                _cut(have[move.source], move, move.source)
            )
    itemsize = {name: getattr(torch, dtype).itemsize for name, dtype in of_tensor.items()}
    away = [move for move in plan if not move.is_local]
    for some in _rounds(away, itemsize, world.mesh.num_ranks, buffer_bytes):
        _exchange(some, itemsize, have, want, world, purpose)


def _known(name: str, part: Part) -> _Known:
    return _Known(name, part.place.box, part.place.shape, dtype_name(part.local.dtype))


def _require_alike(told: Iterable[tuple[list[_Known], list[_Known]]]) -> dict[str, str]:
    """The dtype of each tensor, which is the same wherever it is."""
    first: dict[str, tuple[int, _Known]] = {}
    for rank, (has, wants) in enumerate(told):
        for known in (*has, *wants):
            other, expected = first.setdefault(known.tensor, (rank, known))
            if (known.shape, known.dtype) != (expected.shape, expected.dtype):
                raise DataError(
                    f"{known.tensor} is {known.dtype} {list(known.shape)} on rank {rank}, "
                    f"{expected.dtype} {list(expected.shape)} on rank {other}"
                )
    return {name: known.dtype for name, (_, known) in first.items()}


def _by_place(parts: Iterable[tuple[str, Part]], rank: int) -> dict[Held, Tensor]:
    return {Held(name, rank, part.place.box): part.local for name, part in parts}


def _cut(tensor: Tensor, move: Move, held: Held) -> Tensor:
    return tensor[move.box.within(held.box)]


def _rounds(
    away: Iterable[Move], itemsize: dict[str, int], num_ranks: int, buffer_bytes: int
) -> Iterable[list[Move]]:
    """Moves in rounds of which no rank sends or gets more than fits, the same on every rank."""
    some: list[Move] = []
    sent, got = [0] * num_ranks, [0] * num_ranks
    for move in (rows for whole in away for rows in _in_rows(whole, itemsize, buffer_bytes)):
        source, target = move.source.holder, move.target.holder
        size_bytes = move.box.num_elements * itemsize[move.tensor]
        if some and max(sent[source], got[target]) + size_bytes > buffer_bytes:
            yield some
            some, sent, got = [], [0] * num_ranks, [0] * num_ranks
        some.append(move)
        sent[source] += size_bytes
        got[target] += size_bytes
    if some:
        yield some


def _in_rows(move: Move, itemsize: dict[str, int], buffer_bytes: int) -> Iterable[Move]:
    """A move in as few as fit the buffer, cut along its longest dimension."""
    box = move.box
    size_bytes = box.num_elements * itemsize[move.tensor]
    if size_bytes <= buffer_bytes:
        yield move
        return
    dim = box.sizes.index(max(box.sizes))
    step = max(1, box.sizes[dim] * buffer_bytes // size_bytes)
    for start in range(0, box.sizes[dim], step):
        span = range(start, min(start + step, box.sizes[dim]))
        yield move._replace(box=box.narrowed(dim, span))


def _exchange(
    some: Sequence[Move],
    itemsize: dict[str, int],
    have: dict[Held, Tensor],
    want: dict[Held, Tensor],
    world: World,
    purpose: str,
) -> None:
    """One round: bytes of all dtypes side by side, by rank and then in the plan's order."""
    rank, num_ranks = world.rank, world.mesh.num_ranks
    leaving = sorted((m for m in some if m.source.holder == rank), key=lambda m: m.target.holder)
    coming = sorted((m for m in some if m.target.holder == rank), key=lambda m: m.source.holder)
    sizes = {move: move.box.num_elements * itemsize[move.tensor] for move in (*leaving, *coming)}
    sent, received = [0] * num_ranks, [0] * num_ranks
    for move in leaving:
        sent[move.target.holder] += sizes[move]
    for move in coming:
        received[move.source.holder] += sizes[move]
    packed = [_bytes(_cut(have[move.source], move, move.source)) for move in leaving]
    nothing = torch.empty(0, dtype=torch.uint8, device=world.device)
    found = world.exchange(torch.cat([nothing, *packed]), sent, received, purpose=purpose)
    for move, content in zip(coming, found.split([sizes[m] for m in coming]), strict=True):
        place = _cut(want[move.target], move, move.target)
        place.copy_(content.clone().view(place.dtype).view(place.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
