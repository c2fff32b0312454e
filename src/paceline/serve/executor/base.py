"""The contract between the engine and what computes; shared with the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from paceline.core.errors import PacelineError
from paceline.decode.sampler import Draw, Sampled


class ExecutorLostError(PacelineError):
    """What computes is gone, and with it all keys and values; `Executor.restart` may mend it."""


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


class Executor(Protocol):
    """Computes steps; the engine's thread is its only caller.

    Attributes:
        num_blocks: blocks of keys and values that it has.
        block_size: tokens to a block.
    """

    num_blocks: int
    block_size: int

    def run(self, step: Sequence[Work]) -> StepResult:
        """Computes the tokens and keeps their keys and values.

        Raises:
            ExecutorLostError: nothing can be computed until it is restarted.
        """
        ...

    def release(self, request_id: int) -> None:
        """Forgets a request's table, known or not; its blocks may be given to others."""
        ...

    def restart(self) -> None:
        """Begins anew with empty blocks, after an `ExecutorLostError`."""
        ...

    def close(self) -> None:
        """Ends what it has started."""
        ...
