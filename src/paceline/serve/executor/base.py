"""The contract between the engine and what computes; shared with the simulator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from paceline.core.errors import PacelineError
from paceline.decode.sampler import Draw, Sampled


class ExecutorLostError(PacelineError):
    """What computes is gone, and with it all keys and values; `Executor.restart` may mend it.

    Args:
        message: what has happened, for whoever has asked.
        last_words: what was heard from it before, for whoever runs it.
    """

    def __init__(self, message: str, *, last_words: str = "") -> None:
        super().__init__(message)
        self.last_words = last_words


@dataclass(frozen=True, slots=True)
class Work:
    """A request's part of a step.

    Attributes:
        request_id: of the request.
        tokens: whose keys and values are to be computed.
        start: position of the first of them; 0 begins a table anew unless blocks were found.
        new_blocks: put at the end of the request's table before the tokens are computed.
        draw: how the token after them is chosen; None where more of them exist.
        adapter: name of the adapter that it is computed with; empty for none.
        scored: the tokens that come after the first of them, each after its own, where their
            log-probabilities are wanted; at most as many.
        num_top: likeliest tokens that are told of with each of these.
    """

    request_id: int
    tokens: tuple[int, ...]
    start: int
    new_blocks: tuple[int, ...]
    draw: Draw | None
    adapter: str = ""
    scored: tuple[int, ...] = ()
    num_top: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        sampled: request id to its next token, for the work that asked for one.
        failed: request id to why it cannot be answered; the others are not harmed.
        prompt_logprobs: request id to its `scored` tokens with their log-probabilities.
    """

    sampled: dict[int, Sampled]
    failed: Mapping[int, str] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, Sequence[Sampled]] = field(default_factory=dict)

    def __or__(self, other: StepResult) -> StepResult:
        """What two parts of a step gave together."""
        return StepResult(
            {**self.sampled, **other.sampled},
            {**self.failed, **other.failed},
            {**self.prompt_logprobs, **other.prompt_logprobs},
        )


class Executor(Protocol):
    """Computes steps, in the order in which they come; the engine's thread is its only caller.

    Attributes:
        num_blocks: blocks of keys and values that it has.
        block_size: tokens to a block.
        depth: how many steps it holds at a time; no two of them have a request in common.
    """

    num_blocks: int
    block_size: int
    depth: int

    def submit(self, step: Sequence[Work]) -> None:
        """Takes a step: its tokens are computed, and their keys and values kept.

        Raises:
            ExecutorLostError: nothing can be computed until it is restarted.
        """
        ...

    def collect(self) -> StepResult:
        """Waits for what the oldest of the steps that it holds has given.

        Raises:
            ExecutorLostError: nothing can be computed until it is restarted.
        """
        ...

    def check(self) -> None:
        """Looks whether all is well, at no cost; called now and then while no step is under way.

        Raises:
            ExecutorLostError: nothing can be computed until it is restarted.
        """
        ...

    def release(self, request_id: int) -> None:
        """Forgets a request's table, known or not; its blocks may be given to others.

        No step that the executor holds has a part of the request.
        """
        ...

    def restart(self) -> None:
        """Begins anew with empty blocks, after an `ExecutorLostError`."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...


class OneAtATime(ABC):
    """What executors have in common that compute a step as they take it."""

    depth = 1

    def __init__(self) -> None:
        self._results: deque[StepResult] = deque()

    @abstractmethod
    def run(self, step: Sequence[Work]) -> StepResult:
        """Computes a step."""

    def submit(self, step: Sequence[Work]) -> None:
        self._results.append(self.run(step))

    def collect(self) -> StepResult:
        return self._results.popleft()

    def check(self) -> None:  # noqa: B027 (what is in this process cannot be lost)
        """All is well."""
