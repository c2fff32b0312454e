"""Which layers each stage has: consecutive ones, so that the slowest stage is as fast as can be."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from paceline.parallel.pipeline.base import Costs
from paceline.plan.model_spec import ModelSpec


def stage_layers(
    spec: ModelSpec,
    num_stages: int,
    sequence_length: int,
    cuts: tuple[int, ...] | None = None,
    *,
    has_head: bool = True,
) -> tuple[range, ...]:
    """The layers of every stage.

    Args:
        spec: of the model.
        num_stages: at most its layers: every stage has one.
        sequence_length: tokens of a sequence; attention's share grows with it.
        cuts: the first layer of every stage but the first, as a plan's `pipeline.stage_cuts`.
            Absent: where the largest stage has the fewest FLOPs.
        has_head: whether the output head goes with the last stage.
    """
    if cuts is None:
        flops = layer_flops(spec, sequence_length, has_head=has_head)
        cuts = even_cuts(flops, num_stages)
    return tuple(range(a, b) for a, b in pairwise((0, *cuts, spec.num_layers)))


def layer_flops(spec: ModelSpec, sequence_length: int, *, has_head: bool = True) -> list[float]:
    """Forward FLOPs a token of every layer, the head's with the last layer if that has it.

    Backward passes cost twice as much of each, so the forward ones decide.
    """
    layers = range(spec.num_layers)
    flops = [spec.layer_flops_per_token(layer, sequence_length) for layer in layers]
    if has_head:
        flops[-1] += spec.head_flops_per_token
    return flops


def word_costs(spec: ModelSpec, sequence_length: int, *, num_stages: int, num_ranks: int) -> Costs:
    """What passes take where words are spread over the ranks, a stage's forward pass being 1."""
    stage_flops = sum(layer_flops(spec, sequence_length, has_head=False)) / num_stages
    return Costs(score=spec.head_flops_per_token / num_ranks / stage_flops)


def even_cuts(costs: Sequence[float], num_parts: int) -> tuple[int, ...]:
    """Cuts of a sequence into parts of at least one item each, whose dearest part is cheapest.

    Of several such the one whose parts are the most alike (least sum of squares).

    Returns:
        The index of the first item of every part but the first.
    """
    num_items = len(costs)
    assert 1 <= num_parts <= num_items, f"{num_items} items do not make {num_parts} parts"
    before = [0.0, *accumulate(costs)]

    def cost(first: int, end: int) -> float:
        return before[end] - before[first]

    def squared(first: int, end: int) -> float:
        return cost(first, end) ** 2 if cost(first, end) <= least else math.inf

    least, _ = _cheapest(cost, max, num_items, num_parts)
    return _cheapest(squared, operator.add, num_items, num_parts)[1]


def _cheapest(
    cost: Callable[[int, int], float],
    join: Callable[[float, float], float],
    num_items: int,
    num_parts: int,
) -> tuple[float, tuple[int, ...]]:
    """The best cost of all parts and its cuts, by dynamic programming over ends of the sequence.

    Args:
        cost: of a part from its first item to before its end.
        join: a part's cost and that of all after it.
        num_items: of the sequence.
        num_parts: to cut it into.
    """
    best = {first: (cost(first, num_items), ()) for first in range(num_items)}
    for parts in range(2, num_parts + 1):
        last_cut = num_items - parts + 1
        best = {
            first: min(
                (join(cost(first, cut), best[cut][0]), (cut, *best[cut][1]))
                for cut in range(first + 1, last_cut + 1)
            )
            for first in range(last_cut)
        }
    return best[0]
