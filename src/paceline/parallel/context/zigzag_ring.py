"""Ring attention whose ranks have equal work under a causal mask.

Source: Brandon et al., Striped Attention, arXiv:2311.09431, Sec. 3 (why a ring is out of balance);
    the placement in two chunks is that of the ring-flash-attention project, and of Megatron-LM.
Replaces: ring.  Needs: mesh.cp > 1.  Forbids: peft, train.compile.
Cost: as ring, but rank r has chunks r and 2 cp - 1 - r of a row cut into 2 cp: of the four blocks
    between two ranks' chunks two are seen, and three of its own, on every rank. Rows are padded to
    a multiple of 2 cp.
Differs: two chunks a rank instead of stripes of single tokens, so that blocks need no masks.
"""

from __future__ import annotations

from paceline.parallel.context.base import Method
from paceline.parallel.context.placement import Placement
from paceline.parallel.context.ring import RingCore


def _place(num_ranks: int, _ulysses_degree: int) -> Placement:
    return Placement(num_ranks, is_zigzag=True)


METHOD = Method(place=_place, core=RingCore)
