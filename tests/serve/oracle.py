"""An executor that computes nothing and knows everything: it sees whether a key is the right one.

Each place of its blocks remembers of which sequence it was computed, up to which token. At each
step every key that a request would read is compared with the request's own sequence, and the token
that is then "sampled" is a function of that sequence. So an answer is right only if the engine gave
it the right tokens, positions and blocks, and a wrong block is caught where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from engines import GREEDY, TOKENIZER

from paceline.core.clock import VirtualClock
from paceline.decode.sampler import Sampled
from paceline.models.families.llama import PRESETS
from paceline.serve.engine import Engine
from paceline.serve.executor.base import ExecutorLostError, OneAtATime, StepResult, Work
from paceline.serve.request import Request
from paceline.serve.schedule.base import Budget, Policy

SPEC = PRESETS["tiny"]
FIRST_ANSWER, NUM_ANSWERS = 100, 50
"""Tokens of answers; prompts of tests have others, so that nothing is shared by chance."""

Mark = int
"""Of a tenant, an adapter, a prompt and the tokens up to a place."""


def next_mark(mark: Mark, token: int) -> Mark:
    return hash((mark, token))


def next_token(mark: Mark) -> int:
    return FIRST_ANSWER + mark % NUM_ANSWERS


def answer_alone(request: Request) -> tuple[int, ...]:
    """What any engine must answer, from the request alone."""
    mark = hash((request.tenant, request.adapter))
    for token in request.prompt_ids:
        mark = next_mark(mark, token)
    answer: list[int] = []
    while len(answer) < request.max_tokens:
        answer.append(next_token(mark))
        mark = next_mark(mark, answer[-1])
        if answer[-1] in request.stop_ids:
            break
    return tuple(answer)


class _Sequence:
    """A request, as far as its tokens are known."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.marks = [hash((request.tenant, request.adapter))]  # before the first token
        self.table: list[int] = []
        for token in request.prompt_ids:
            self.add(token)

    def add(self, token: int) -> None:
        self.tokens.append(token)
        self.marks.append(next_mark(self.marks[-1], token))


class Oracle(OneAtATime):
    """The executor.

    Args:
        num_blocks: that it has.
        block_size: tokens to a block.

    Attributes:
        num_computed: tokens of prompts that it was given to compute.
        fails: requests that it cannot answer.
        is_lost: whether the next step loses everything.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        super().__init__()
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_computed = 0
        self.fails: set[int] = set()
        self.is_lost = False
        self._sequences: dict[int, _Sequence] = {}
        self._blocks: list[list[Mark | None]] = []
        self.restart()

    def expect(self, request_id: int, request: Request) -> None:
        """Says what a request of the engine is."""
        self._sequences[request_id] = _Sequence(request)

    def run(self, step: Sequence[Work]) -> StepResult:
        assert len({work.request_id for work in step}) == len(step), "a request has two parts"
        if self.is_lost:
            self.is_lost = False
            raise ExecutorLostError("the oracle is lost")
        for work in step:  # all are written before any is read, as in one pass
            self._write(work)
        sampled = {work.request_id: self._sample(work) for work in step if work.draw is not None}
        for work in step:
            self._require_right_keys(work)
        failed = {work.request_id: "it fails" for work in step if work.request_id in self.fails}
        return StepResult(sampled, failed)

    def release(self, request_id: int) -> None:
        if request_id in self._sequences:
            self._sequences[request_id].table.clear()

    def restart(self) -> None:
        """Nothing is kept."""
        self._blocks = [[None] * self.block_size for _ in range(self.num_blocks)]
        for sequence in self._sequences.values():
            sequence.table.clear()

    def close(self) -> None:
        pass

    def _write(self, work: Work) -> None:
        sequence = self._sequences[work.request_id]
        end = work.start + len(work.tokens)
        assert work.tokens, "nothing to compute, and nothing to sample from"
        assert work.adapter == sequence.request.adapter
        assert list(work.tokens) == sequence.tokens[work.start : end], "these are not its tokens"
        assert work.start == 0 or sequence.table or work.new_blocks, "its table is gone"
        sequence.table.extend(work.new_blocks)
        assert len(set(sequence.table)) == len(sequence.table), "a block is in a table twice"
        assert len(sequence.table) == -(-end // self.block_size), "a table of the wrong length"
        self.num_computed += max(0, min(end, len(sequence.request.prompt_ids)) - work.start)
        for place in range(work.start, end):
            block = sequence.table[place // self.block_size]
            self._blocks[block][place % self.block_size] = sequence.marks[place + 1]

    def _require_right_keys(self, work: Work) -> None:
        """Of all places that the work reads, its own tokens' among them."""
        sequence = self._sequences[work.request_id]
        known = [mark for block in sequence.table for mark in self._blocks[block]]
        end = work.start + len(work.tokens)
        true = sequence.marks[1 : end + 1]
        wrong = next((place for place in range(end) if known[place] != true[place]), None)
        assert wrong is None, f"request {work.request_id} reads a wrong key at {wrong}"

    def _sample(self, work: Work) -> Sampled:
        sequence = self._sequences[work.request_id]
        end = work.start + len(work.tokens)
        assert work.draw is not None
        assert work.draw.position == end == len(sequence.tokens), "sampled too early, or too late"
        token = next_token(sequence.marks[end])
        sequence.add(token)
        return Sampled(token)


def oracle_engine(
    policy: Policy,
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_batch_tokens: int = 32,
    max_sequences: int = 8,
) -> tuple[Engine, Oracle]:
    """An engine whose keys are all checked, on a clock that stands still."""
    executor = Oracle(num_blocks, block_size)
    budget = Budget(max_batch_tokens, max_sequences)
    clock = VirtualClock()
    return Engine(executor, policy, budget, SPEC, TOKENIZER, clock=clock), executor


def ask_ids(prompt_ids: Sequence[int], max_tokens: int = 4, **options) -> Request:
    """A request for an oracle, which needs no sampling."""
    return Request(
        prompt_ids=tuple(prompt_ids),
        sampling=GREEDY,
        max_tokens=max_tokens,
        ignore_eos=True,
        **options,
    )


def generate(engine: Engine, oracle: Oracle, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """The answers' tokens, of requests that an engine answers as a job."""
    submit, numbers = engine.submit, count(engine._next_id)

    def submit_expected(request: Request, on_delta) -> int:
        oracle.expect(next(numbers), request)
        return submit(request, on_delta)

    engine.submit = submit_expected
    try:
        return [answer.token_ids for answer in engine.generate(requests)]
    finally:
        del engine.submit
