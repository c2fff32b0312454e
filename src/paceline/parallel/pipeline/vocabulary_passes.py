"""Where the passes of a spread vocabulary go in any schedule. Pure.

Source: Yeung et al., Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288,
    Sec. 4 and 5: S of a micro-batch after the last stage's forward pass, T after all S, the last
    stage's backward pass after all T (one barrier less where S makes its term alone); one more
    micro-batch under way for each barrier, in which the others wait for nobody.
Differs: where passes go is found on a virtual clock, so that one rule serves all schedules, and
    not by a building block for each; rows of embeddings are looked up two micro-batches ahead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from paceline.parallel.pipeline.base import (
    UNIT_COSTS,
    VOCABULARY_PASSES,
    Action,
    Costs,
    Kind,
    Line,
    RankActions,
    ended_by,
    needs,
    ranks_of_stages,
)

_AHEAD = 2
# The passes of a share, first what others wait for.
_ONE_BARRIER = (Kind.SCORE_WEIGHT, Kind.SCORE_INPUT, Kind.EMBED_WEIGHT, Kind.EMBED)
_TWO_BARRIERS = (Kind.SCORE_BACKWARD, Kind.SCORE, Kind.EMBED_WEIGHT, Kind.EMBED)
_FORWARD_ONLY = (Kind.LOSS, Kind.SCORE, Kind.EMBED)


def spread_vocabulary(
    actions: RankActions, num_barriers: int, costs: Costs = UNIT_COSTS
) -> RankActions:
    """Adds the passes of every rank's share of the vocabulary to a schedule's.

    The stages' passes keep their order, but for this: each rank runs `num_barriers` micro-batches'
    forward passes more before each of its backward passes. A share's pass stands where a rank that
    takes what is ready would run it, if a transfer of the vocabulary's took as long as a forward
    pass: so long it can be hidden.

    Args:
        actions: passes of stages, without transfers; forward passes alone for an evaluation.
        num_barriers: how often a micro-batch waits for all ranks between the last stage's forward
            and backward pass: 1 or 2.
        costs: what passes take.

    Raises:
        ValueError: the order waits for itself.
    """
    assert num_barriers in (1, 2), f"{num_barriers} barriers"
    is_training = any(action.kind is not Kind.FORWARD for own in actions for action in own)
    order = tuple(_delayed(own, num_barriers) for own in actions) if is_training else actions
    trained = _ONE_BARRIER if num_barriers == 1 else _TWO_BARRIERS
    placing = _Placing(order, trained if is_training else _FORWARD_ONLY, costs)
    placing.run()
    return tuple(map(tuple, placing.placed))


def _delayed(own: Sequence[Action], num_microbatches: int) -> tuple[Action, ...]:
    """A rank's passes, its backward passes behind more micro-batches' forward passes."""
    forward = [action for action in own if action.kind is Kind.FORWARD]
    by = num_microbatches * len({action.stage for action in own})
    behind: list[list[Action]] = [[] for _ in range(len(forward) + 1)]
    count = 0
    for action in own:
        if action.kind is Kind.FORWARD:
            count += 1
        else:
            behind[min(count + by, len(forward))].append(action)
    pairs = zip(forward, behind[1:], strict=True)
    return (*behind[0], *(action for first, rest in pairs for action in (first, *rest)))


class _Placing:
    """All ranks on one virtual clock."""

    def __init__(self, order: RankActions, kinds: Sequence[Kind], costs: Costs) -> None:
        self.placed: list[list[Action]] = [[] for _ in order]
        self._costs = costs
        ranks = ranks_of_stages(order)
        shares = tuple(min(action.stage for action in own) for own in order)
        self._line = Line(ranks, shares)
        microbatches = range(1 + max(action.microbatch for own in order for action in own))
        # What a rank chooses from: first its share's passes, then those of its stages.
        self._queues = [
            [
                *(deque(Action(kind, share, index) for index in microbatches) for kind in kinds),
                deque(own),
            ]
            for share, own in zip(shares, order, strict=True)
        ]
        self._free = [0.0] * len(order)
        self._ends: dict[Action, float] = {}
        self._ready: dict[Action, float] = {}

    def run(self) -> None:
        while any(queue for queues in self._queues for queue in queues):
            start, rank, _, queue = min(
                (max(self._free[rank], self._ready_at(queue[0])), rank, index, queue)
                for rank, queues in enumerate(self._queues)
                for index, queue in enumerate(queues)
                if queue
            )
            if start == math.inf:
                raise ValueError(f"the order waits for itself, at {queue[0]}")
            self._start(rank, queue.popleft(), start)

    def _start(self, rank: int, action: Action, start: float) -> None:
        self.placed[rank].append(action)
        self._free[rank] = end = start + self._costs.of(action.kind)
        self._ends |= dict.fromkeys(ended_by(action), end)

    def _ready_at(self, action: Action) -> float:
        """When all that a pass needs is on its rank; infinite while that is not known."""
        if action not in self._ready:
            needed = list(self._needs(action))
            if any(need not in self._ends for need in needed):
                return math.inf
            times = (self._ends[need] + self._transfer(need, action) for need in needed)
            self._ready[action] = max(times, default=0.0)
        return self._ready[action]

    def _needs(self, action: Action) -> Iterable[Action]:
        yield from needs(action, self._line)
        before = action.microbatch - _AHEAD - 1
        if action.kind is Kind.EMBED and before >= 0:  # else all rows would be looked up at once
            yield Action(Kind.FORWARD, 0, before)

    def _transfer(self, need: Action, action: Action) -> float:
        """How long what a pass needs is on its way."""
        is_here = self._line.ranks[need.stage] == self._line.ranks[action.stage]
        is_of_words = need.kind in VOCABULARY_PASSES or action.kind in VOCABULARY_PASSES
        return self._costs.forward if is_of_words and not is_here else 0.0
