"""Half of 1F1B's bubble in half of its activations, on stages laid out like a V (V-Half).

Source: Qi et al., Pipeline Parallelism with Controllable Memory, arXiv:2405.15362, Sec. 3.
Replaces: one_f_one_b.  Needs: stages_per_rank = 2; split backward passes.  Forbids: zero.stage = 3.
Cost: bubble (p - 1)(t_F + t_I + t_W) / 2 a step on p ranks where the three are equal and there
    are at least p micro-batches (one stage's pass less where p is odd); every rank holds
    activations of at most floor((p + 2) / 2) micro-batches; twice 1F1B's transfers.
Differs: weight passes go where the costs leave gaps, within the same activations; no optimizer
    post-validation.
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule
from paceline.parallel.pipeline.weight_passes import place_weight_passes

# The building block: when the passes of one micro-batch run, in passes of one stage. Every rank
# repeats it with a period of six passes, in which its own six (three on each of two stages) never
# collide. A pass on the way down the ranks takes two steps to the next rank, one on the way up
# takes one: half of what would leave no bubble (Sec. 3.3), so that activations live half as long.
_PERIOD = 6
_DOWN_STEPS = 2
_UP_STEPS = 1
_TURN_STEPS = (1, 2, 2)  # at the last rank, between the model's end and its gradient, at the last


def _order(
    num_ranks: int,
    stages_per_rank: int,
    num_microbatches: int,
    costs: Costs,
) -> RankActions:
    order = tuple(_rank_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    limit = 2 * ((num_ranks + 2) // 2)
    return place_weight_passes(order, num_ranks * stages_per_rank, [limit] * num_ranks, costs)


def _rank_order(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    down, up = rank, 2 * num_ranks - 1 - rank
    hops, rest = num_ranks - 1, num_ranks - 1 - rank
    turn, loss, turn_back = _TURN_STEPS
    length = hops * (_DOWN_STEPS + _UP_STEPS) + turn + loss  # from first pass to first gradient
    starts = {
        (Kind.FORWARD, down): _DOWN_STEPS * rank,
        (Kind.FORWARD, up): _DOWN_STEPS * hops + turn + _UP_STEPS * rest,
        (Kind.BACKWARD_INPUT, up): length + _DOWN_STEPS * rank,
        (Kind.BACKWARD_INPUT, down): length + _DOWN_STEPS * hops + turn_back + _UP_STEPS * rest,
    }
    timed = [
        (start + _PERIOD * index, Action(kind, stage, index))
        for (kind, stage), start in starts.items()
        for index in range(num_microbatches)
    ]
    return tuple(action for _, action in sorted(timed))


V_HALF = Schedule(
    order=_order, placement="v", splits_backward=True, min_stages_per_rank=2, max_stages_per_rank=2
)
