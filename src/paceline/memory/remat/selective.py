"""The core of attention is computed again: much memory for few FLOPs.

Source: Korthikanti et al., Reducing Activation Recomputation, arXiv:2205.05198, Sec. 5.
Replaces: none.  Needs: nothing.  Forbids: nothing.
Cost: the attention core's forward FLOPs once more a step (`ModelSpec.attention_flops_per_token`).
Differs: torch's fused kernel keeps no scores to begin with; what is saved is its output and its
    logarithms of sums, or all scores where a mask makes it fall back to plain products.
"""

from __future__ import annotations

from paceline.memory.remat.base import Remat, recomputed

SELECTIVE = Remat(around_core=recomputed)
