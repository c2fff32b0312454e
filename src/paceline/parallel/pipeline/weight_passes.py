"""Where the weight passes of split backward passes go.

Nobody waits for a weight pass, so it fills what would be a bubble; but it ends the life of an
activation, so it cannot be put off for ever.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from paceline.parallel.pipeline.base import Action, Costs, Kind, RankActions, line_of, needs


def place_weight_passes(order: RankActions, limit: int, costs: Costs) -> RankActions:
    """Adds the weight passes to forward and input passes, whose order stays.

    A rank runs its oldest weight pass when the next forward pass would hold one activation too
    many, and while it would else wait; the rest at the end.

    Args:
        order: forward and input passes of every rank.
        limit: activations, in stages, that each rank may hold from forward to weight pass.
        costs: of the passes; transfers take no time here.

    Raises:
        ValueError: the order waits for itself, or holds more than the limit.
    """
    placing = _Placing(order, limit, costs)
    placing.run()
    return tuple(tuple(actions) for actions in placing.placed)


class _Placing:
    """All ranks on one virtual clock, so that each knows what it would wait for."""

    def __init__(self, order: RankActions, limit: int, costs: Costs) -> None:
        self.limit = limit
        self.costs = costs
        self.line = line_of(order)
        self.placed: list[list[Action]] = [[] for _ in order]
        self._todo = [deque(actions) for actions in order]
        self._weight_passes: list[deque[Action]] = [deque() for _ in order]
        self._held = [0] * len(order)
        self._ends: dict[Action, float] = {}
        self._waiting: dict[Action, tuple[float, int]] = {}
        self._free = [(0.0, rank) for rank in range(len(order))]

    def run(self) -> None:
        while self._free:
            now, rank = heapq.heappop(self._free)
            if self._todo[rank]:
                self._decide(rank, now)
            else:
                self.placed[rank] += self._weight_passes[rank]
        if self._waiting:
            missing = min(self._waiting)
            raise ValueError(f"the order waits for {missing}, which never runs")

    def _decide(self, rank: int, now: float) -> None:
        action = self._todo[rank][0]
        needed = needs(action, self.line)
        unknown = [need for need in needed if need not in self._ends]
        ready = math.inf if unknown else max((self._ends[need] for need in needed), default=now)
        is_full = action.kind is Kind.FORWARD and self._held[rank] == self.limit
        has_weight_pass = bool(self._weight_passes[rank])
        if is_full and not has_weight_pass:
            raise ValueError(f"rank {rank} holds more than {self.limit} at {action}")
        # A gap that is more than half as long as the pass: to wait would lose more than to be late.
        if is_full or (has_weight_pass and 2 * (ready - now) >= self.costs.backward_weight):
            self._start(rank, self._weight_passes[rank].popleft(), now)
        elif ready <= now:
            self._start(rank, self._todo[rank].popleft(), now)
        elif unknown:
            self._waiting[unknown[-1]] = (now, rank)
        else:
            heapq.heappush(self._free, (ready, rank))

    def _start(self, rank: int, action: Action, now: float) -> None:
        kind = action.kind
        self.placed[rank].append(action)
        self._held[rank] += {Kind.FORWARD: 1, Kind.BACKWARD_WEIGHT: -1}.get(kind, 0)
        if kind is Kind.BACKWARD_INPUT:
            self._weight_passes[rank].append(action._replace(kind=Kind.BACKWARD_WEIGHT))
        end = self._ends[action] = now + self.costs.of(kind)
        heapq.heappush(self._free, (end, rank))
        if action in self._waiting:
            since, waiter = self._waiting.pop(action)
            heapq.heappush(self._free, (max(since, end), waiter))
