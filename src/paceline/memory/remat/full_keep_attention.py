"""Every block is computed again from its input, but for the core of its attention.

Source: Li et al., LightSeq (DistFlashAttn), arXiv:2310.03294, Sec. 3.3 (checkpoints at the output
    of attention, so that no pass computes or sends it twice).
Replaces: full.  Needs: mesh.cp > 1, whose cores can tell what they keep.  Forbids: nothing.
Cost: the blocks' forward FLOPs once more a step without those of the attention core
    (`ModelSpec.attention_flops_per_token`), and none of the core's forward traffic; kept are, of
    each block, one hidden state, the core's output and the logarithms of its sums; with heads
    exchanged, also the queries, keys and values that a rank attends with.
Differs: checkpoints stay at the ends of blocks, and the core's output is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from paceline.memory.remat.base import Remat, recomputed


class Keepable(Protocol):
    """A core of attention that can keep what it gives."""

    def keeping(self) -> Callable[..., Any]:
        """The core for one attention of one pass: called again, it gives what it gave."""
        ...


def _keeping(block: Callable[..., Any], *arguments: Any) -> Any:
    attend: Keepable = arguments[-1]
    return recomputed(block, *arguments[:-1], attend.keeping())


FULL_KEEP_ATTENTION = Remat(around_block=_keeping)
