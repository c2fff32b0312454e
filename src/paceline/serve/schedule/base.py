"""The contract of serving policies, shared by the engine and the simulator.

One rule covers prompts, chunks, cached prefixes and answers: a request has `num_computed` tokens
whose keys and values exist, chasing the `num_total` that it consists of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy sees of a request.

    Attributes:
        id: of the request.
        arrival_s: when it came.
        num_prompt: tokens of its prompt.
        num_computed: tokens whose keys and values exist; of a waiting request those that it finds
            in the cache.
        num_total: tokens that it consists of; always more than are computed.
        max_total: tokens that it may come to consist of.
        num_blocks: blocks that it holds; of a waiting request those that it finds in the cache.
        num_freed: blocks that would be free if it were preempted; of a waiting request, those of
            the cached ones that count as free until it holds them.
        is_busy: whether a step that is not done yet has a part of it: it gets no share, and is not
            preempted.
        follows: of a waiting request, another that computes its next block, or would if it were
            admitted: one that runs, or that waits before it. None if there is none.
    """

    id: int
    arrival_s: float
    num_prompt: int
    num_computed: int
    num_total: int
    max_total: int
    num_blocks: int = 0
    num_freed: int = 0
    is_busy: bool = False
    follows: int | None = None

    @property
    def num_left(self) -> int:
        """Tokens that exist and are not computed."""
        return self.num_total - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether all of the prompt is computed, so that one token at a time is left."""
        return self.num_computed >= self.num_prompt


@dataclass(frozen=True, slots=True)
class View:
    """What a policy sees.

    Attributes:
        running: requests that hold blocks, in the order in which they were admitted.
        waiting: requests that hold none, in the order in which they came, preempted ones first. It
            may be made as it is read: a policy reads what it admits, and few beside.
        num_free: blocks that can be taken, those of the cache that nobody holds among them.
        block_size: tokens to a block.
        num_virtual: tokens before every request's own that take room in its blocks.
    """

    running: Sequence[RequestView]
    waiting: Sequence[RequestView]
    num_free: int
    block_size: int
    num_virtual: int = 0


@dataclass(frozen=True, slots=True)
class Budget:
    """What one step may hold.

    Attributes:
        max_batch_tokens: tokens computed, over all requests.
        max_sequences: requests that may hold blocks at a time.
        max_shares: requests that have a part of the step. Where several steps are under way at a
            time each has a part of the requests.
    """

    max_batch_tokens: int
    max_sequences: int
    max_shares: int | None = None


@dataclass(frozen=True, slots=True)
class Share:
    """How many of a request's next tokens a step computes."""

    request_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes.

    Attributes:
        shares: of a waiting request a share means that it is admitted.
        preempted: running requests whose blocks are taken away first; they wait anew, and what
            they had is computed again unless it is still in the cache.
    """

    shares: tuple[Share, ...]
    preempted: tuple[int, ...] = ()


class Policy(Protocol):
    """Decides one step. Pure: no clock, no randomness, nothing kept between calls.

    One that is `Arranging` too has an order for jobs that are known whole.

    Args:
        view: the requests that have not ended.
        budget: what the step may hold.
        now_s: the time.

    Returns:
        Shares of at least one token, none beyond a request's total, within the budget and the free
        blocks. Not empty while there are requests and none is busy, if the blocks hold each of
        them alone.
    """

    def __call__(self, view: View, budget: Budget, now_s: float) -> StepPlan: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """A request of a job that is known whole, before any of it has begun.

    Attributes:
        root: requests of one root share what their prompts begin with, and no others.
        prompt_ids: the prompt's tokens.
        num_answer: tokens that its answer is expected to have.
    """

    root: bytes
    prompt_ids: Sequence[int]
    num_answer: int


@runtime_checkable
class Arranging(Protocol):
    """A policy that has an order of its own for a job that is known whole."""

    def arrange(self, job: Sequence[Asked], block_size: int) -> Sequence[int]:
        """The places of the job's requests, in the order in which they are to wait. Pure."""
        ...


def arrange(policy: Policy, job: Sequence[Asked], block_size: int) -> Sequence[int]:
    """The order in which a job's requests wait: the policy's own, or that of the job."""
    if isinstance(policy, Arranging):
        return policy.arrange(job, block_size)
    return range(len(job))
