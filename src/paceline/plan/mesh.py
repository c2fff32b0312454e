"""The mesh: which axes a run is parallel over, and which rank sits where."""

from __future__ import annotations

import math
from dataclasses import dataclass

from paceline.core.config import Config

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Mesh axes, outermost first: ranks that differ only in `tp` are neighbours."""

DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes whose ranks read different data."""

EXPERT_AXES = ("pp", "dp_replicate", "ep_replicate", "ep")
"""The same ranks as experts see them: dp_shard x cp x tp, re-grouped, ep innermost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig(Config):
    """Degrees of parallelism. The product of all but `ep` is the number of ranks.

    Attributes:
        pp: pipeline stages.
        dp_replicate: replicas of the whole state.
        dp_shard: ranks that share one state as `zero.stage` says.
        cp: ranks that share each sequence.
        tp: ranks that share each matrix.
        ep: ranks that share the experts; re-groups dp_shard x cp x tp, tp innermost.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Degrees in the order of `AXES`."""
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def num_ranks(self) -> int:
        return math.prod(self.shape)

    @property
    def ep_replicate(self) -> int:
        """Ranks of dp_shard x cp x tp that hold the same experts."""
        return self.dp_shard * self.cp * self.tp // self.ep

    @property
    def num_data_ranks(self) -> int:
        """How many ranks read different data."""
        return self.dp_replicate * self.dp_shard

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` sits on each axis; row-major over `AXES`."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"rank {rank} is not in a mesh of {self.num_ranks} ranks")
        coordinates: dict[str, int] = {}
        for axis, degree in zip(reversed(AXES), reversed(self.shape), strict=True):
            rank, coordinates[axis] = divmod(rank, degree)
        return {axis: coordinates[axis] for axis in AXES}

    def expert_coordinate(self, rank: int) -> dict[str, int]:
        """Where `rank` sits on each of `EXPERT_AXES`."""
        coordinate = self.coordinate(rank)
        flat = (coordinate["dp_shard"] * self.cp + coordinate["cp"]) * self.tp + coordinate["tp"]
        replicate, index = divmod(flat, self.ep)
        places = coordinate["pp"], coordinate["dp_replicate"], replicate, index
        return dict(zip(EXPERT_AXES, places, strict=True))

    def name_rank(self, rank: int) -> str:
        """A rank and its place on the axes that have several: ``rank 3 (pp=1 tp=1)``."""
        coordinate = self.coordinate(rank)
        places = [f"{axis}={n}" for axis, n in coordinate.items() if getattr(self, axis) > 1]
        return f"rank {rank} ({' '.join(places)})" if places else f"rank {rank}"

    def data_index(self, rank: int) -> int:
        """The index of `rank` among the ranks that read different data."""
        coordinate = self.coordinate(rank)
        return coordinate["dp_replicate"] * self.dp_shard + coordinate["dp_shard"]

    def groups(self, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
        """All sets of ranks that differ only on `axes`, each in order of rank.

        Args:
            axes: all of `AXES`, or all of `EXPERT_AXES`.
        """
        view = AXES if set(axes) <= set(AXES) else EXPERT_AXES
        locate = self.coordinate if view is AXES else self.expert_coordinate
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            coordinate = locate(rank)
            fixed = tuple(coordinate[axis] for axis in view if axis not in axes)
            members.setdefault(fixed, []).append(rank)
        return [tuple(ranks) for ranks in members.values()]
