"""One forward pass, one backward pass in turn, after as many forward passes as ranks follow.

Source: Narayanan et al., PipeDream-Flush, arXiv:2006.09503; arXiv:2104.04473, Sec. 2.2.1, Fig. 4.
Replaces: nothing, it is the default.  Needs: stages_per_rank = 1.  Forbids: nothing.
Cost: bubble (p - 1)(t_F + t_B) a step on p ranks; rank r holds activations of at most p - r
    micro-batches.
Differs: nothing.
"""

from __future__ import annotations

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, Schedule, Sizes


def alternate(forward: list[Action], backward: list[Action], num_warmup: int) -> tuple[Action, ...]:
    """Some forward passes, then a forward and a backward pass in turn, then what is left.

    Args:
        forward: forward passes of a rank, in order.
        backward: as many backward passes, in order.
        num_warmup: forward passes before the first pair.
    """
    num_warmup = min(num_warmup, len(forward))
    steady = zip(forward[num_warmup:], backward, strict=False)
    pairs = [action for pair in steady for action in pair]
    return (*forward[:num_warmup], *pairs, *backward[len(forward) - num_warmup :])


def one_f_one_b(sizes: Sizes, backward: Kind) -> RankActions:
    """The order with backward passes of a kind, whole or of inputs alone."""

    def passes(kind: Kind, rank: int) -> list[Action]:
        return [Action(kind, rank, index) for index in range(sizes.num_microbatches)]

    return tuple(
        alternate(passes(Kind.FORWARD, rank), passes(backward, rank), sizes.num_ranks - 1 - rank)
        for rank in range(sizes.num_ranks)
    )


def _order(sizes: Sizes, costs: Costs) -> RankActions:  # noqa: ARG001
    return one_f_one_b(sizes, Kind.BACKWARD)


ONE_F_ONE_B = Schedule(order=_order)
