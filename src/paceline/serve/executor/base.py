"""The contract of executors, shared by the engine and the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from paceline.decode.sampler import SamplingParams


@dataclass(frozen=True, slots=True)
class Work:
    """One request's part of a step.

    Attributes:
        request_id: of the request.
        tokens: the next tokens to compute.
        start: position of the first of them.
        sampling: how to sample the token that follows, or None if more of the prompt is to come.
    """

    request_id: int
    tokens: tuple[int, ...]
    start: int
    sampling: SamplingParams | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        sampled: request id to its next token, for the work that asked for one.
    """

    sampled: dict[int, int]


class Executor(Protocol):
    """Computes steps; the engine's thread is its only caller."""

    def run(self, step: Sequence[Work]) -> StepResult:
        """Computes the tokens and keeps their keys and values."""
        ...

    def release(self, request_id: int) -> None:
        """Forgets a request, known or not."""
        ...
