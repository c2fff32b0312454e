"""Half of 1F1B's bubble in half of its activations, on stages laid out like a V (V-Half).

Source: Qi et al., Pipeline Parallelism with Controllable Memory, arXiv:2405.15362, Sec. 3.
Replaces: one_f_one_b.  Needs: stages_per_rank = 2; split backward passes.  Forbids: zero.stage = 3.
Cost: bubble at most (p - 1)(t_F + t_I + t_W) / 2 a step on p ranks where the three are equal (one
    or two of a stage's passes less); every rank holds activations of at most floor((p + 2) / 2)
    micro-batches; twice 1F1B's transfers. The bubble does not grow with the number of
    micro-batches where t_W + 2 t_I >= 2 t_F and t_W + 2 t_F >= 2 t_I.
Differs: the pauses at the turns of the building block are this file's; weight passes go where the
    costs leave gaps, within the same activations; no optimizer post-validation.
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule, Sizes
from paceline.parallel.pipeline.weight_passes import place_weight_passes

# The building block: when the passes of one micro-batch run, in passes of one stage. Every rank
# repeats it with a period of six, the passes of its two stages, of which no two then collide. On
# the way down the ranks a pass follows that of the rank before by two, on the way up by one: half
# of what leaves no bubble, so that activations live half as long.
_PERIOD = 6
_DOWN_STEPS = 2
_UP_STEPS = 1
# Steps at the last rank, then at the first between loss and gradient, then at the last again. An
# even number of ranks may hold one activation of a stage more, half of a micro-batch's two; so
# long a micro-batch can pause, and passes that cost more or less than others do not add up.
_TURN_STEPS = {"odd": (1, 2, 2), "even": (4, 2, 4)}


def _order(sizes: Sizes, costs: Costs) -> RankActions:
    ranks = range(sizes.num_ranks)
    order = tuple(_rank_order(r, sizes.num_ranks, sizes.num_microbatches) for r in ranks)
    return place_weight_passes(order, 2 * ((sizes.num_ranks + 2) // 2), costs)


def _rank_order(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    down, up = rank, 2 * num_ranks - 1 - rank
    hops, rest = num_ranks - 1, num_ranks - 1 - rank
    turn, loss, turn_back = _TURN_STEPS["odd" if num_ranks % 2 else "even"]
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
