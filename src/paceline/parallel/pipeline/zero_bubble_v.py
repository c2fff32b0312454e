"""Zero-bubble schedule on stages laid out like a V (ZB-V).

Source: Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241, Sec. 6.
Replaces: one_f_one_b.  Needs: stages_per_rank = 2; split backward passes.  Forbids: zero.stage = 3.
Cost: no bubble on p ranks where forward, input and weight passes cost the same and there are at
    least 2p - 1 micro-batches: from its own first pass to its last a rank never waits, and ranks
    end as they began, up to p - 1 stages' time apart; every rank holds activations of at most p
    micro-batches, as 1F1B's first; twice 1F1B's transfers.
Differs: weight passes go where the costs leave gaps; no optimizer post-validation (Sec. 4), so the
    gradient's norm waits for the last rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule, Sizes
from paceline.parallel.pipeline.weight_passes import place_weight_passes


def _order(sizes: Sizes, costs: Costs) -> RankActions:
    ranks = range(sizes.num_ranks)
    order = tuple(_rank_order(r, sizes.num_ranks, sizes.num_microbatches) for r in ranks)
    return place_weight_passes(order, 2 * sizes.num_ranks, costs)


def _rank_order(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Action, ...]:
    down, up = rank, 2 * num_ranks - 1 - rank
    passes = [
        # Until the first micro-batch is back at this rank,
        *[(Kind.FORWARD, down)] * (2 * (num_ranks - rank) - 1),
        # until its gradient is,
        *[(Kind.FORWARD, up), (Kind.FORWARD, down)] * rank,
        # until its gradient is here a second time:
        *[(Kind.FORWARD, up), (Kind.BACKWARD_INPUT, up)] * (num_ranks - rank),
        *[(kind, s) for s in (down, up) for kind in (Kind.FORWARD, Kind.BACKWARD_INPUT)]
        * num_microbatches,
    ]
    return _numbered(passes, num_microbatches)


def _numbered(passes: Iterable[tuple[Kind, int]], num_microbatches: int) -> tuple[Action, ...]:
    """Passes with their micro-batches, first to last; those beyond the last are left out.

    What stays of a sound order is sound: micro-batches need nothing of each other.
    """
    counts: Counter[tuple[Kind, int]] = Counter()
    actions: list[Action] = []
    for each in passes:
        if counts[each] < num_microbatches:
            actions.append(Action(*each, counts[each]))
        counts[each] += 1
    return tuple(actions)


ZERO_BUBBLE_V = Schedule(
    order=_order, placement="v", splits_backward=True, min_stages_per_rank=2, max_stages_per_rank=2
)
