"""The contract of pipeline schedules: what a rank does, in order, as plain data.

A model is cut into stages, numbered from its input. A micro-batch goes through all of them, and
its gradient back. Each rank has one stage or several. Where the words of the vocabulary are spread
over the ranks, each rank has a share of them, and passes for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol


class Kind(StrEnum):
    """What an action does. Transfers are named by the stage on the rank that runs them.

    A share of the vocabulary bears the number of its rank's first stage. Its passes come in two
    forms, after the number of times that a micro-batch waits for all ranks: S and T, or SI and TW.
    """

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and weights
    BACKWARD_INPUT = "I"  # gradients of inputs: what the stage before waits for
    BACKWARD_WEIGHT = "W"  # gradients of weights: what nobody waits for
    SEND_FORWARD = "SF"  # the stage's output
    RECEIVE_FORWARD = "RF"  # the stage's input
    SEND_BACKWARD = "SB"  # the gradient of the stage's input
    RECEIVE_BACKWARD = "RB"  # the gradient of the stage's output

    EMBED = "E"  # rows of the tokens whose words are here
    EMBED_WEIGHT = "EW"  # the gradient of these rows
    SCORE = "S"  # logits of the words that are here, and their statistics
    SCORE_BACKWARD = "T"  # a term of the gradient of hidden states, and the head's gradient
    SCORE_INPUT = "SI"  # as S, and the term as far as the words that are here tell it
    SCORE_WEIGHT = "TW"  # the head's gradient: what nobody waits for
    LOSS = "L"  # of an evaluation: what all statistics give
    SEND_ROWS = "SE"  # of a share, to the first stage
    RECEIVE_ROWS = "RE"  # of all other shares
    SEND_ROW_GRADIENTS = "SG"  # of the first stage, to each other share its own
    RECEIVE_ROW_GRADIENTS = "RG"
    SEND_HIDDEN = "SH"  # hidden states of the last stage, to all other shares
    RECEIVE_HIDDEN = "RH"
    SEND_STATISTICS = "SS"  # of a share's logits, to all other shares
    RECEIVE_STATISTICS = "RS"  # of all other shares
    SEND_TERM = "ST"  # of a share, to the last stage
    RECEIVE_TERM = "RT"  # of all other shares


STAGE_PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
VOCABULARY_PASSES = (
    Kind.EMBED,
    Kind.EMBED_WEIGHT,
    Kind.SCORE,
    Kind.SCORE_BACKWARD,
    Kind.SCORE_INPUT,
    Kind.SCORE_WEIGHT,
    Kind.LOSS,
)
COMPUTES = (*STAGE_PASSES, *VOCABULARY_PASSES)


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
    """Durations of the passes of one stage, and of a rank's words, in any one unit.

    Attributes:
        forward: of a stage.
        backward_input: of a stage.
        backward_weight: of a stage.
        score: one product of hidden states and a rank's words; three make logits and gradients.
        embed: rows of a rank's words, looked up or added to.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    score: float = 0.5
    embed: float = 0.0

    def of(self, kind: Kind) -> float:
        """How long a rank is busy with an action; transfers keep no rank busy."""
        return {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward_input + self.backward_weight,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.backward_weight,
            Kind.EMBED: self.embed,
            Kind.EMBED_WEIGHT: self.embed,
            Kind.SCORE: self.score,
            Kind.SCORE_BACKWARD: 2 * self.score,
            Kind.SCORE_INPUT: 2 * self.score,
            Kind.SCORE_WEIGHT: self.score,
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


@dataclass(frozen=True, slots=True)
class Line:
    """A pipeline's stages, and who has words.

    Attributes:
        ranks: the rank on the pipeline's axis of every stage.
        shares: the share of the vocabulary that each rank has; none where edge stages have it all.
    """

    ranks: Mapping[int, int]
    shares: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The last stage."""
        return len(self.ranks) - 1

    def share_of(self, rank: int) -> int:
        """The share of a rank."""
        return next(share for share in self.shares if self.ranks[share] == rank)


def ranks_of_stages(actions: Iterable[Iterable[Action]]) -> dict[int, int]:
    """The rank that runs each stage, read off what ranks do."""
    return {action.stage: rank for rank, own in enumerate(actions) for action in own}


def line_of(actions: Iterable[Sequence[Action]]) -> Line:
    """The stages and shares of what ranks do."""
    actions = list(actions)
    shares = {a.stage for own in actions for a in own if a.kind in VOCABULARY_PASSES}
    return Line(ranks_of_stages(actions), tuple(sorted(shares)))


def needs(action: Action, line: Line) -> tuple[Action, ...]:
    """The passes that must have ended before one begins, by the names of `ended_by`."""
    kind, stage, microbatch = action
    match kind:
        case Kind.FORWARD if stage:
            return (Action(kind, stage - 1, microbatch),)
        case Kind.FORWARD:
            return _of_shares(Kind.EMBED, microbatch, line)
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            own = Action(Kind.FORWARD, stage, microbatch)
            if stage == line.last:
                return (own, *_of_shares(Kind.SCORE_INPUT, microbatch, line))
            return (own, Action(Kind.BACKWARD_INPUT, stage + 1, microbatch))
        case Kind.BACKWARD_WEIGHT:
            return (Action(Kind.BACKWARD_INPUT, stage, microbatch),)
        case Kind.SCORE | Kind.SCORE_INPUT:
            return (Action(Kind.FORWARD, line.last, microbatch),)
        case Kind.SCORE_BACKWARD | Kind.SCORE_WEIGHT | Kind.LOSS:
            return _of_shares(Kind.SCORE, microbatch, line)
        case Kind.EMBED_WEIGHT:
            return (
                Action(Kind.EMBED, stage, microbatch),
                Action(Kind.BACKWARD_INPUT, 0, microbatch),
            )
        case _:
            return ()


def _of_shares(kind: Kind, microbatch: int, line: Line) -> tuple[Action, ...]:
    return tuple(Action(kind, share, microbatch) for share in line.shares)


_ENDED_BY = {
    Kind.BACKWARD: (Kind.BACKWARD, Kind.BACKWARD_INPUT),
    Kind.SCORE_INPUT: (Kind.SCORE_INPUT, Kind.SCORE),
    Kind.SCORE_BACKWARD: (Kind.SCORE_BACKWARD, Kind.SCORE_INPUT),
}


def ended_by(action: Action) -> tuple[Action, ...]:
    """The passes by whose names others need this one: see `needs`.

    A whole backward pass ends an input pass, and T ends the term that SI does: what others need
    has one name, whatever makes it.
    """
    kinds = _ENDED_BY.get(action.kind, (action.kind,))
    return tuple(action._replace(kind=kind) for kind in kinds)


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
