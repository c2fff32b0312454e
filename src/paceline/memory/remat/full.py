"""Every block is computed again from its input.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, Sec. 4; Huang
    et al., GPipe, arXiv:1811.06965, Sec. 2.3.
Replaces: none.  Needs: nothing.  Forbids: nothing.
Cost: the blocks' forward FLOPs once more a step, and, where a block is split over ranks, its
    forward collectives, but for a last sum that no norm follows; kept is one hidden state a block.
Differs: one block at a time, whatever their number.
"""

from __future__ import annotations

from paceline.memory.remat.base import Remat, recomputed

FULL = Remat(around_block=recomputed)
