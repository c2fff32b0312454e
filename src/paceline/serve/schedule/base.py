"""The contract of serving policies, shared by the engine and the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy sees of a request.

    Attributes:
        id: of the request.
        arrival_s: when it came.
        num_computed: tokens whose keys and values exist.
        num_total: tokens that it consists of; always more than are computed.
    """

    id: int
    arrival_s: float
    num_computed: int
    num_total: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What one step may hold.

    Attributes:
        max_batch_tokens: tokens computed, over all requests.
        max_sequences: requests that may hold a cache at a time.
    """

    max_batch_tokens: int
    max_sequences: int


@dataclass(frozen=True, slots=True)
class Share:
    """How many of a request's next tokens a step computes."""

    request_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    shares: tuple[Share, ...]


class Policy(Protocol):
    """Decides one step. Pure: no clock, no randomness, nothing kept between calls.

    Args:
        view: the requests that have not ended, in order of arrival.
        budget: what the step may hold.
        now_s: the time.

    Returns:
        Shares of at least one token, none beyond a request's total, within the budget. Not empty
        while there are requests.
    """

    def __call__(self, view: Sequence[RequestView], budget: Budget, now_s: float) -> StepPlan: ...
