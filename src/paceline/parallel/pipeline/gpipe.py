"""All forward passes, then all backward passes.

Source: Huang et al., GPipe, arXiv:1811.06965, Sec. 2.3, Fig. 2.
Replaces: one_f_one_b.  Needs: stages_per_rank = 1.  Forbids: nothing.
Cost: bubble (p - 1)(t_F + t_B) a step on p ranks; all m micro-batches' activations at once.
Differs: backward passes run in the order of micro-batches, as in all schedules, not in reverse.
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule, Sizes


def _order(sizes: Sizes, costs: Costs) -> RankActions:  # noqa: ARG001
    kinds, microbatches = (Kind.FORWARD, Kind.BACKWARD), range(sizes.num_microbatches)
    return tuple(
        tuple(Action(kind, rank, index) for kind in kinds for index in microbatches)
        for rank in range(sizes.num_ranks)
    )


GPIPE = Schedule(order=_order)
