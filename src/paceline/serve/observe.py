"""What may be known of a running engine: its steps as they end, and its answers as they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paceline.serve.executor.base import Work

if TYPE_CHECKING:
    from paceline.serve.book import Book
    from paceline.serve.request import Delta, RequestState


@dataclass(frozen=True, slots=True)
class Step:
    """One step, and the state that it left.

    Attributes:
        num_tokens: that it computed.
        num_context: tokens whose keys and values it read, its own among them.
        num_scores: pairs of a query and a key that it multiplied, in each head of each layer.
        num_running: requests that hold blocks.
        num_waiting: requests that hold none.
        kv_usage: share of the blocks that are held, from 0 to 1.
        num_preempted: how often requests have lost their blocks, so far.
        num_prompt_tokens: of admitted requests, so far: what has been looked for in the cache.
        num_found_tokens: of these, what was found there.
    """

    num_tokens: int
    num_context: int
    num_scores: int
    num_running: int
    num_waiting: int
    kv_usage: float
    num_preempted: int
    num_prompt_tokens: int
    num_found_tokens: int


class Observer(Protocol):
    """Is told what happens, and changes nothing."""

    def stepped(self, step: Step) -> None:
        """A step has ended; the engine's thread, which waits."""
        ...

    def told(self, state: RequestState, delta: Delta) -> None:
        """A part of an answer has left; the thread that hands answers over."""
        ...


def step_of(work: Sequence[Work], book: Book) -> Step:
    """What a step computed, and what its book says after it."""
    pool = book.kv.pool
    return Step(
        num_tokens=sum(len(one.tokens) for one in work),
        num_context=sum(one.start + len(one.tokens) for one in work),
        num_scores=sum(
            len(one.tokens) * one.start + len(one.tokens) * (len(one.tokens) + 1) // 2
            for one in work
        ),
        num_running=len(book.running),
        num_waiting=len(book.waiting),
        kv_usage=1 - pool.num_free / pool.num_blocks,
        num_preempted=book.num_preempted,
        num_prompt_tokens=book.num_prompt_tokens,
        num_found_tokens=book.num_found_tokens,
    )
