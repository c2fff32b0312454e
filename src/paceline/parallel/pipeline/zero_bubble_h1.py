"""Zero-bubble schedule with the memory of 1F1B (ZB-H1).

Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, Sec. 2.1, Fig. 3.
Replaces: one_f_one_b.  Needs: stages_per_rank = 1; split backward passes.  Forbids: zero.stage = 3.
Cost: bubble (p - 1)(t_F + t_I - t_W) a step on p ranks, with t_I for inputs and t_W, which is no
    more than t_F or t_I, for weights (a third of 1F1B's where the three are equal); every rank
    holds activations of at most p micro-batches, as 1F1B's first.
Differs: weight passes go where the costs leave gaps, not at fixed places; no optimizer
    post-validation (Sec. 4).
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Costs, Kind, RankActions, Schedule, Sizes
from paceline.parallel.pipeline.one_f_one_b import one_f_one_b
from paceline.parallel.pipeline.weight_passes import place_weight_passes


def _order(sizes: Sizes, costs: Costs) -> RankActions:
    order = one_f_one_b(sizes, Kind.BACKWARD_INPUT)
    return place_weight_passes(order, sizes.num_ranks, costs)


ZERO_BUBBLE_H1 = Schedule(order=_order, splits_backward=True)
