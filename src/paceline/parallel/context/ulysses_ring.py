"""Heads are exchanged among neighbours, and keys go round the ranks that have the same heads.

Source: Fang and Zhao, USP: A Unified Sequence Parallelism Approach, arXiv:2405.07719, Sec. 3.
Replaces: ring.  Needs: mesh.cp > 1, context.ulysses_degree at most a tensor rank's query heads.
Forbids: peft, train.compile.
Cost: with u = context.ulysses_degree, that of ulysses among u neighbours, and that of zigzag-ring
    among the cp / u ranks that have the same heads, whose keys and values are those of u ranks'
    tokens and of their own key heads.
Differs: all ranks of the axis call one all-to-all, in which strangers send each other nothing.
"""

from __future__ import annotations

from paceline.parallel.context.base import Method
from paceline.parallel.context.placement import Placement
from paceline.parallel.context.ulysses import UlyssesCore


def _place(num_ranks: int, ulysses_degree: int) -> Placement:
    num_parts = num_ranks // ulysses_degree
    return Placement(num_parts, ranks_per_part=ulysses_degree, is_zigzag=num_parts > 1)


METHOD = Method(place=_place, core=UlyssesCore)
