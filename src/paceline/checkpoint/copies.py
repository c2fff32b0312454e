"""Ranks that hold the same part of a tensor must hold the same bits.

Replicas, tensor ranks with whole norms, neighbours that share a key head: of each part that several
ranks hold, one rank's copy is written, and the others would be lost without a word where they
differ. So at a save each rank sums up the bits of its copies, and the sums are compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from paceline.checkpoint.overlap import meeting
from paceline.core.errors import RankError
from paceline.dist.world import World
from paceline.optim.parts import NamedParts, named_parts
from paceline.plan.layout import Box

Region = tuple[str, Box]
"""A tensor's name, and a part of it."""

Fingerprint = tuple[int, int]
"""The sum of a region's bits as integers, and the sum of each times its place from 1 on, both
modulo 2**64: the second tells apart what has changed places."""

_CHUNK_ELEMENTS = 1 << 18
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_copies(parts: NamedParts, world: World) -> None:
    """Compares what several ranks hold alike; called by every rank.

    Args:
        parts: of this rank.
        world: the ranks.

    Raises:
        RankError: two ranks hold different bits of a part; names it and them, on all ranks.

    Cost: reads each copied part once, and nothing where there are no copies. Ranks exchange the
        boxes that they have, and 16 bytes for each region that has copies.
    """
    if world.mesh.num_ranks == 1:
        return
    parts = named_parts(parts)
    boxes = world.collect([(name, part.place.box) for name, part in parts])
    regions = copied_regions(boxes)
    require_equal_copies(world.collect(fingerprints(parts, regions)))


def copied_regions(of_ranks: Sequence[Iterable[Region]]) -> frozenset[Region]:
    """The regions that more than one rank holds.

    Args:
        of_ranks: the parts that each rank has.
    """
    holders: defaultdict[str, defaultdict[Box, set[int]]] = defaultdict(lambda: defaultdict(set))
    for rank, of_rank in enumerate(of_ranks):
        for name, box in of_rank:
            if box.num_elements:
                holders[name][box].add(rank)
    found: set[Region] = set()
    for name, of_tensor in holders.items():
        found |= {(name, box) for box, ranks in of_tensor.items() if len(ranks) > 1}
        for one, other in meeting(list(of_tensor)):
            if len(of_tensor[one] | of_tensor[other]) > 1:
                found.add((name, one.meet(other)))
    return frozenset(found)


@torch.no_grad()
def fingerprints(parts: NamedParts, regions: Iterable[Region]) -> dict[Region, Fingerprint]:
    """What tells this rank's copies of some regions from others, computed where they lie.

    Args:
        parts: of this rank.
        regions: those that it does not have are left out.
    """
    wanted: defaultdict[str, list[Box]] = defaultdict(list)
    for name, box in regions:
        wanted[name].append(box)
    keys: list[Region] = []
    sums: list[Tensor] = []
    for name, part in named_parts(parts):
        for box in wanted.get(name, ()):
            if box.num_elements and part.place.box.meet(box) == box:
                keys.append((name, box))
                sums.append(_sums(part.local.detach()[box.within(part.place.box)]))
    found = torch.stack(sums).tolist() if sums else []
    return {key: (plain, weighted) for key, (plain, weighted) in zip(keys, found, strict=True)}


def require_equal_copies(of_ranks: Sequence[Mapping[Region, Fingerprint]]) -> None:
    """Raises RankError if two ranks' copies of a region differ; names the tensor and the ranks.

    Args:
        of_ranks: each rank's fingerprints, in order of rank.
    """
    holders: defaultdict[Region, defaultdict[Fingerprint, list[int]]]
    holders = defaultdict(lambda: defaultdict(list))
    for rank, of_rank in enumerate(of_ranks):
        for region, fingerprint in of_rank.items():
            holders[region][fingerprint].append(rank)
    for (name, box), found in holders.items():
        if len(found) > 1:
            sides = " and ".join(f"rank(s) {', '.join(map(str, r))}" for r in found.values())
            raise RankError(
                f"{name}: {sides} hold different bits of {box}, of which they have copies",
                hint="a rank's memory or a sum over ranks has gone wrong: go on from the "
                "checkpoint before",
            )


def _sums(region: Tensor) -> Tensor:
    """Both sums of a fingerprint, (2,) int64; 4 GB of float32 a second on a core of a CPU."""
    bits = region.reshape(-1).view(_BITS[region.itemsize])
    size = min(len(bits), _CHUNK_ELEMENTS)
    places = torch.arange(1, size + 1, device=region.device)
    buffer = torch.empty_like(places)  # made once: memory that is new for each chunk takes longer
    total = torch.zeros(2, dtype=torch.int64, device=region.device)
    for start in range(0, len(bits), _CHUNK_ELEMENTS):
        chunk = bits[start : start + _CHUNK_ELEMENTS]
        values = buffer[: len(chunk)].copy_(chunk)
        plain = values.sum()
        total[0] += plain
        total[1] += values.mul_(places[: len(chunk)]).sum() + plain * start
    return total
