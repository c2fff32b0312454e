"""Several stages a rank, in rounds of as many micro-batches as there are ranks.

Source: Narayanan et al., Megatron-LM, arXiv:2104.04473, Sec. 2.2.2, Fig. 4;
    activations: Korthikanti et al., arXiv:2205.05198, Sec. 4.2.3.
Replaces: one_f_one_b.  Needs: stages_per_rank >= 2; num_microbatches a multiple of p.
Forbids: nothing.
Cost: bubble (p - 1)(t_F + t_B) a step on p ranks, of a stage's times, which are 1 / v of a rank's
    with v stages; activations of at most pv + p - 1 stages on the first rank; v times the
    transfers.
Differs: nothing.
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule, Sizes
from paceline.parallel.pipeline.one_f_one_b import alternate


def _order(sizes: Sizes, costs: Costs) -> RankActions:  # noqa: ARG001
    return tuple(_rank_order(rank, *sizes) for rank in range(sizes.num_ranks))


def _rank_order(
    rank: int, num_ranks: int, stages_per_rank: int, num_microbatches: int
) -> tuple[Action, ...]:
    stages = [rank + num_ranks * chunk for chunk in range(stages_per_rank)]
    rounds = [range(first, first + num_ranks) for first in range(0, num_microbatches, num_ranks)]

    def passes(kind: Kind, order: list[int]) -> list[Action]:
        return [Action(kind, stage, n) for indices in rounds for stage in order for n in indices]

    # From a pass here to the gradient that it leads to: down to the last rank and back, and one
    # round for each stage of this rank but its last.
    num_warmup = 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks
    backward = passes(Kind.BACKWARD, stages[::-1])
    return alternate(passes(Kind.FORWARD, stages), backward, num_warmup)


INTERLEAVED = Schedule(
    order=_order, min_stages_per_rank=2, max_stages_per_rank=None, needs_rounds=True
)
