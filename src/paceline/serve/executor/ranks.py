"""The executor of many processes: a pipeline of stages, each cut over tensor ranks.

Source: Du et al., EnergonAI, arXiv:2209.02341 (hierarchy-controller architecture; non-blocking
    pipeline parallelism; distributed redundant computation elimination).
Replaces: the executor of one process.  Needs: serve.mesh.tp or serve.mesh.pp above 1.
Forbids: adapters that are served side by side, virtual tokens, int8 weights, logits that do not
    depend on the batch.
Cost: weights, keys and values / (tp pp) a rank; a key head is copied to every rank whose query
    heads read it. A token of a step costs 2 D values a layer in all-reduces over tp, D more for the
    embedding, and D values from stage to stage. Logits stay in the last stage. A grammar that is
    new is compiled in the step that first needs it, and all of that step waits.
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

from paceline.decode.grammar_check import GrammarBounds
from paceline.serve.executor.base import StepResult, Work
from paceline.serve.executor.deadline import Deadline
from paceline.serve.executor.draws import DrawTeller
from paceline.serve.executor.messages import Done, Job, Step
from paceline.serve.executor.workers import Start, Workers, spawn

_KEPT = 1 << 12  # spans: more than a test or a trace looks at, and bounded, because servers are
_GRAMMAR_S = 4 * GrammarBounds().compile_s  # to compile one, beside ranks that compute


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
        num_grammars: that are compiled in it.
        num_before: that are compiled in the steps before it that were under way.
        begin_s: when it was handed in.
    """

    number: int
    num_tokens: int
    num_grammars: int
    num_before: int
    begin_s: float


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
        assert not any(work.adapter for work in step), "ranks have no adapters beside the model"
        works = tuple(self._draws.new_of(work) for work in step)
        self._number += 1
        message = Step(number=self._number, released=tuple(self._released), works=works)
        self._released.clear()
        new = _UnderWay(
            self._number,
            sum(len(work.tokens) for work in works),
            _num_grammars(works),
            sum(other.num_grammars for other in self._under_way),
            time.monotonic(),
        )
        self._under_way.append(new)
        self.workers.send(message, self._allowed_s(new))

    def collect(self) -> StepResult:
        step = self._under_way[0]
        allowed_s = self._allowed_s(step)
        while step.number not in self._results:
            left_s = step.begin_s + allowed_s - time.monotonic()
            rank, done = self.workers.receive(left_s, allowed_s)
            assert isinstance(done, Done), "a rank begins only once"
            self.spans.append(Span(rank, replace(done, result=None)))
            if done.result is not None:
                self._results[done.number] = done.result
        if step.num_grammars + step.num_before == 0:  # else its time says nothing of others
            self._deadline.took(step.num_tokens, time.monotonic() - step.begin_s)
        self._under_way.popleft()
        return self._results.pop(step.number)

    def check(self) -> None:
        self.workers.check()

    def release(self, request_id: int) -> None:
        self._released.append(request_id)
        self._draws.forget(request_id)

    def restart(self) -> None:
        self.close()
        self._begin()

    def close(self) -> None:
        self.workers.close()

    def _allowed_s(self, step: _UnderWay) -> float:
        num_grammars = step.num_grammars + step.num_before
        return self._deadline.allowed_s(step.num_tokens) + _GRAMMAR_S * num_grammars

    def _begin(self) -> None:
        self._released: list[int] = []
        self._under_way: deque[_UnderWay] = deque()
        self._results: dict[int, StepResult] = {}
        self._draws = DrawTeller()
        self._deadline = replace(self._deadline, is_first=True)
        self.workers = Workers(self._job, self._start_rank)


def _num_grammars(works: Sequence[Work]) -> int:
    """Grammars that are told of for the first time."""
    return sum(work.draw is not None and work.draw.grammar is not None for work in works)
