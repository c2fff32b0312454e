"""The contract of pipeline schedules: what a rank does, in order, as plain data.

A model is cut into stages, numbered from its input. A micro-batch goes through all of them, and
its gradient back. Each rank has one stage or several.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol


class Kind(StrEnum):
    """What an action does. Transfers are named by the stage on the rank that runs them."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and weights
    BACKWARD_INPUT = "I"  # gradients of inputs: what the stage before waits for
    BACKWARD_WEIGHT = "W"  # gradients of weights: what nobody waits for
    SEND_FORWARD = "SF"  # the stage's output
    RECEIVE_FORWARD = "RF"  # the stage's input
    SEND_BACKWARD = "SB"  # the gradient of the stage's input
    RECEIVE_BACKWARD = "RB"  # the gradient of the stage's output


COMPUTES = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


class Action(NamedTuple):
    """One thing that a rank does for one micro-batch on one stage; ``F3.0`` in text."""

    kind: Kind
    stage: int
    microbatch: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


RankActions = tuple[tuple[Action, ...], ...]
"""For each rank, what it does in order."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations of the passes of one stage, in any one unit."""

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    def of(self, kind: Kind) -> float:
        """How long a rank is busy with an action; transfers keep no rank busy."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward_input + self.backward_weight,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
        }.get(kind, 0.0)


UNIT_COSTS = Costs()


class Sizes(NamedTuple):
    """Of one step of a pipeline: its ranks, the stages of each, and micro-batches."""

    num_ranks: int
    stages_per_rank: int
    num_microbatches: int


class Order(Protocol):
    """Computes the passes of every rank. Pure.

    Args:
        sizes: of a step.
        costs: what the passes take; only where weight passes go may depend on it.
    """

    def __call__(self, sizes: Sizes, costs: Costs) -> RankActions: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A pipeline schedule and its traits.

    Every stage runs its backward passes, and the weight passes among them, in the order of
    micro-batches: so all schedules add up the same gradients in the same order, bit by bit.

    Attributes:
        order: computes the passes of every rank.
        placement: ``loop``: stage s is on rank s mod num_ranks. ``v``: rank r has stages r and
            2 num_ranks - 1 - r, so that one rank has both ends of the model.
        splits_backward: whether gradients of inputs and of weights are passes of their own.
        min_stages_per_rank: the fewest stages of a rank.
        max_stages_per_rank: the most; None for no limit.
        needs_rounds: whether num_microbatches must be a multiple of num_ranks.
    """

    order: Order
    placement: Literal["loop", "v"] = "loop"
    splits_backward: bool = False
    min_stages_per_rank: int = 1
    max_stages_per_rank: int | None = 1
    needs_rounds: bool = False

    def actions(
        self,
        num_ranks: int,
        stages_per_rank: int,
        num_microbatches: int,
        costs: Costs = UNIT_COSTS,
    ) -> RankActions:
        """The passes of every rank; `paceline.plan.check` has seen to it that the sizes go."""
        most = self.max_stages_per_rank or stages_per_rank
        assert self.min_stages_per_rank <= stages_per_rank <= most, "stages_per_rank does not go"
        assert num_microbatches % self.microbatch_unit(num_ranks) == 0, "not in whole rounds"
        return self.order(Sizes(num_ranks, stages_per_rank, num_microbatches), costs)

    def microbatch_unit(self, num_ranks: int) -> int:
        """What the number of micro-batches must be a multiple of."""
        return num_ranks if self.needs_rounds else 1

    def stages_of(self, rank: int, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
        """The stages of a rank, in order."""
        if self.placement == "v":
            return (rank, 2 * num_ranks - 1 - rank)
        return tuple(range(rank, num_ranks * stages_per_rank, num_ranks))


def ranks_of_stages(actions: Iterable[Iterable[Action]]) -> dict[int, int]:
    """The rank that runs each stage, read off what ranks do."""
    return {action.stage: rank for rank, own in enumerate(actions) for action in own}


def needs(action: Action, num_stages: int) -> tuple[Action, ...]:
    """The passes that must have ended before one begins.

    A whole backward pass ends an input pass and a weight pass: here the input pass stands for it.
    """
    kind, stage, microbatch = action
    match kind:
        case Kind.FORWARD:
            return (Action(kind, stage - 1, microbatch),) if stage else ()
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            own = Action(Kind.FORWARD, stage, microbatch)
            after = Action(Kind.BACKWARD_INPUT, stage + 1, microbatch)
            return (own, after) if stage + 1 < num_stages else (own,)
        case Kind.BACKWARD_WEIGHT:
            return (Action(Kind.BACKWARD_INPUT, stage, microbatch),)
        case _:
            return ()


def ended_by(action: Action) -> Action:
    """The pass by whose name others need this one: see `needs`."""
    return action._replace(kind=Kind.BACKWARD_INPUT) if action.kind is Kind.BACKWARD else action


def forward_only(actions: RankActions) -> RankActions:
    """The forward passes of a schedule for an evaluation: in waves, whatever the schedule's order.

    A rank with several stages takes what can have reached it first, so that none waits for a
    micro-batch that is still on its way.
    """
    return tuple(
        tuple(
            sorted(
                (action for action in own if action.kind is Kind.FORWARD),
                key=lambda action: (action.stage + action.microbatch, action.stage),
            )
        )
        for own in actions
    )
