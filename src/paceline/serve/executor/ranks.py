"""The executor of many processes: a pipeline of stages, each cut over tensor ranks.

Source: Du et al., EnergonAI, arXiv:2209.02341 (hierarchy-controller architecture; non-blocking
    pipeline parallelism; distributed redundant computation elimination).
Replaces: the executor of one process.  Needs: serve.mesh.tp or serve.mesh.pp above 1.
Forbids: adapters that are served side by side, virtual tokens, log-probabilities of prompts.
Cost: weights, keys and values / (tp pp) a rank; a key head is copied to every rank whose query
    heads read it. A token of a step costs 2 D values a layer in all-reduces over tp, D more for the
    embedding, and D values from stage to stage. Logits stay in the last stage.
Differs: a step is of requests, of which each is at one place of the pipeline: as many steps are
    under way as there are stages, each with its part of the requests. Padding is not removed before
    and put back: tokens are packed from the first layer to the last. Memory is not pooled.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.deadline import Deadline
from paceline.serve.executor.messages import Done, Job, Step
from paceline.serve.executor.workers import Start, Workers, spawn

_KEPT = 1 << 12  # spans: more than a test or a trace looks at, and bounded, because servers are


class Span(NamedTuple):
    """What a rank did of a step.

    Attributes:
        rank: which.
        done: when, and how much.
    """

    rank: int
    done: Done


class _UnderWay(NamedTuple):
    """A step that is not collected yet.

    Attributes:
        number: of the step.
        num_tokens: that it computes.
        begin_s: when it was handed in.
        failed: works that were not, and why.
    """

    number: int
    num_tokens: int
    begin_s: float
    failed: dict[int, str]


class RanksExecutor:
    """Gives steps to ranks that it has started, and takes up what they choose.

    Args:
        job: what the ranks compute.
        depth: steps under way at a time; absent: one a stage, so that no stage waits for another.
        start: starts a rank.
        deadline: of steps.

    Attributes:
        spans: what ranks have done last.

    Raises:
        ExecutorLostError: a rank cannot begin.
    """

    def __init__(
        self,
        job: Job,
        *,
        depth: int | None = None,
        start: Start = spawn,
        deadline: Deadline | None = None,
    ) -> None:
        self.num_blocks, self.block_size = job.num_blocks, job.block_size
        self.depth = depth or job.pp
        self.spans: deque[Span] = deque(maxlen=_KEPT)
        self._job, self._start_rank = job, start
        self._deadline = deadline or Deadline()
        self._number = 0
        self._begin()

    def submit(self, step: Sequence[Work]) -> None:
        failed = {work.request_id: why for work in step if (why := _refusal(work))}
        works = tuple(work for work in step if work.request_id not in failed)
        num_tokens = sum(len(work.tokens) for work in works)
        self._number += 1
        message = Step(number=self._number, released=tuple(self._released), works=works)
        self._released.clear()
        self._under_way.append(_UnderWay(self._number, num_tokens, time.monotonic(), failed))
        self.workers.send(message, self._deadline.allowed_s(num_tokens))

    def collect(self) -> StepResult:
        step = self._under_way[0]
        allowed_s = self._deadline.allowed_s(step.num_tokens)
        while step.number not in self._results:
            left_s = step.begin_s + allowed_s - time.monotonic()
            rank, done = self.workers.receive(left_s, allowed_s)
            assert isinstance(done, Done), "a rank begins only once"
            self.spans.append(Span(rank, replace(done, result=None)))
            if done.result is not None:
                self._results[done.number] = done.result
        self._deadline.took(step.num_tokens, time.monotonic() - step.begin_s)
        self._under_way.popleft()
        result = self._results.pop(step.number)
        return replace(result, failed={**result.failed, **step.failed})

    def check(self) -> None:
        self.workers.check()

    def release(self, request_id: int) -> None:
        self._released.append(request_id)

    def restart(self) -> None:
        self.close()
        self._begin()

    def close(self) -> None:
        self.workers.close()

    def _begin(self) -> None:
        self._released: list[int] = []
        self._under_way: deque[_UnderWay] = deque()
        self._results: dict[int, StepResult] = {}
        self._deadline = replace(self._deadline, is_first=True)
        self.workers = Workers(self._job, self._start_rank)


def _refusal(work: Work) -> str:
    """Why ranks cannot compute a request; empty if they can."""
    if work.adapter:
        return f"the adapter {work.adapter} is not served over ranks, as serve.mesh has them"
    if work.wants_logprobs:
        return "log-probabilities of prompts are not given over ranks, as serve.mesh has them"
    return ""
