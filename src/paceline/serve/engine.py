"""The serving loop: admit, schedule, run, emit."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from paceline.core.clock import Clock, WallClock
from paceline.core.errors import PacelineError, RequestError
from paceline.decode.grammar_check import GrammarCheck
from paceline.decode.sampler import Sampled
from paceline.models.tokenizer import Tokenizer
from paceline.plan.model_spec import ModelSpec
from paceline.serve.adapters import require_adapter
from paceline.serve.book import Book
from paceline.serve.executor.base import Executor, ExecutorLostError, StepResult, Work
from paceline.serve.kv.owner import root
from paceline.serve.kv.pool import Key
from paceline.serve.observe import Observer, step_of
from paceline.serve.outlet import Event, Outlet
from paceline.serve.queue_cap import QueueCap
from paceline.serve.request import (
    AnswerText,
    Delta,
    FinishReason,
    Request,
    RequestState,
)
from paceline.serve.schedule.base import Asked, Budget, Policy, StepPlan, arrange
from paceline.serve.servable import require_servable

_log = logging.getLogger(__name__)
_LOOK_S = 1.0  # between looks at an executor that has nothing to do


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without stop strings.
        token_ids: all sampled tokens, the one that ended it included.
        finish_reason: ``stop`` or ``length``; ``error`` where it could not go on.
        error: why, where the reason is an error.
        logprobs: the tokens with their log-probabilities, where these were asked for.
        prompt_logprobs: those of the prompt but the first, where these were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str = ""
    logprobs: tuple[Sampled, ...] = ()
    prompt_logprobs: tuple[Sampled, ...] = ()


class _UnderWay(NamedTuple):
    """A step that the executor holds.

    Attributes:
        plan: that the policy has chosen.
        work: what of it the executor got.
    """

    plan: StepPlan
    work: Sequence[Work]


class Engine:
    """Serves one model.

    `submit` and `cancel` may be called from any thread; either one thread runs `serve`, or the
    caller runs `drain`.

    Args:
        executor: computes steps.
        policy: decides them.
        budget: what a step may hold.
        spec: sizes of the model; the context is what virtual tokens leave of it.
        tokenizer: of the model.
        clock: what time is read from.
        num_virtual: tokens before every request's own that take room in its blocks.
        grammars: whether a request's can be used; None where the executor knows none.
        dtype: of weights, keys and values, for estimates of the bytes that a step reads.
        adapters: names that a request may give as its adapter.

    Attributes:
        adapters: the names of the adapters beside the model.
        queue_cap: how much may wait; None for any number.
        is_restarting: whether what computes was lost and is being started again.
    """

    def __init__(
        self,
        executor: Executor,
        policy: Policy,
        budget: Budget,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        clock: Clock | None = None,
        num_virtual: int = 0,
        grammars: GrammarCheck | None = None,
        dtype: str = "float32",
        adapters: Sequence[str] = (),
    ) -> None:
        self.spec, self.tokenizer, self.dtype = spec, tokenizer, dtype
        self.adapters = tuple(adapters)
        self.queue_cap: QueueCap | None = None
        self.is_restarting = False
        self.book = Book(executor.num_blocks, executor.block_size, num_virtual)
        self._room_tokens = executor.num_blocks * executor.block_size - num_virtual
        self._executor, self._policy, self._budget = executor, policy, budget
        self._under_way: deque[_UnderWay] = deque()  # what the executor holds, the oldest first
        self._clock, self._grammars = clock or WallClock(), grammars
        self._outlet = Outlet(self.cancel)
        self._observer: Observer | None = None
        self._arrived: list[RequestState] = []
        self._cancelled: set[int] = set()
        self._next_id = 0
        self._wake = threading.Condition()
        self._is_stopped = False
        self._failure: Exception | None = None

    # For callers, from any thread

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> int:
        """Hands in a request; its answer comes through `on_delta`, from the engine's threads.

        Returns:
            The request's id.

        Raises:
            RequestError: it cannot be answered.
            QueueFullError: too much waits.
            PacelineError: the engine has stopped or failed.
        """
        self.require(request)
        with self._wake:
            if self._is_stopped or self._failure:
                raise PacelineError("the engine has stopped")
            if self.queue_cap is not None:
                self.queue_cap.require_room(self.waiting())
            number, self._next_id = self._next_id, self._next_id + 1
            self._arrived.append(self._begun(number, request, on_delta))
            self._wake.notify()
        return number

    def require(self, request: Request) -> None:
        """Returns if a request can be answered.

        A grammar that is new is compiled on trial, which may take seconds: who must not wait
        calls this on another thread before `submit`, which then finds it known.

        Raises:
            RequestError: it cannot be answered.
        """
        require_servable(request, self.spec, self._room_tokens)
        require_adapter(request.adapter, self.adapters)
        if request.grammar is not None:
            if self._grammars is None:
                raise RequestError("this engine knows no grammars", param="grammar")
            self._grammars.require(request.grammar)

    def cancel(self, request_id: int) -> None:
        """Ends a request that is no longer wanted; one that has ended is left alone."""
        with self._wake:
            self._cancelled.add(request_id)
            self._wake.notify()

    def waiting(self) -> list[Request]:
        """The requests that hold no blocks yet, or no more; a moment's picture, for any thread."""
        states = [*self._arrived, *list(self.book.waiting.values())]
        return [state.request for state in states]

    def observe(self, observer: Observer) -> None:
        """From now on `observer` is told of steps and answers."""
        self._observer = self._outlet.observer = observer

    def stop(self) -> None:
        """Ends `serve` after the step that it is in; open requests are aborted."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """Answers a job, whose requests are known ahead, on this thread; answers are in order."""
        requests = list(requests)
        for request in requests:  # all of them, before the first is begun
            self.require(request)
        answers: list[list[Delta]] = [[] for _ in requests]
        job = [Asked(root_of(each), each.prompt_ids, each.max_tokens) for each in requests]
        for place in arrange(self._policy, job, self.book.kv.block_size):
            self.submit(requests[place], answers[place].append)
        self.drain()
        return [join(deltas) for deltas in answers]

    def drain(self) -> None:
        """Computes steps on this thread until every request has ended."""
        while self.book or self._arrived:
            self.step()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are being taken."""
        return not (self._is_stopped or self._failure)

    def close(self) -> None:
        """Ends what computes; the last call, of the thread that has called for steps."""
        self._executor.close()

    # The loop

    def serve(self) -> None:
        """Runs until `stop`; a failure ends every open request with an error, then is raised."""
        self._outlet.start()
        try:
            while self._wait():
                self.step()
        except Exception as error:
            self._failure = error
            _log.exception("the engine failed")
            raise
        finally:
            self._admit()
            self._end_all("error" if self._failure else "abort")
            self._outlet.close()
            self._is_stopped = True  # whatever it was that ended it
            self.close()

    def step(self) -> None:
        """Admits what has come, begins what steps the executor can take, and takes up the oldest.

        An executor that holds several computes the others meanwhile.
        """
        self._admit()
        computed: Sequence[Work] = ()
        try:
            while len(self._under_way) < self._executor.depth and self._begin():
                pass
            if self._under_way:
                result = self._executor.collect()
                plan, computed = self._under_way.popleft()
                self._emit(plan, result)
            else:
                self._executor.check()
        except ExecutorLostError as error:
            self._begin_anew(error)
        self._tell(computed)

    def _begin(self) -> bool:
        """Begins a step of what the policy chooses; whether it has chosen anything."""
        now_s = self._clock.now_s()
        plan = self._policy(self.book.view(), self._part_of_budget(), now_s)
        for request_id in plan.preempted:
            self._executor.release(request_id)
            self.book.preempt(request_id)
        work = [self.book.work(share, now_s) for share in plan.shares]
        if work:
            self._executor.submit(work)
            self._under_way.append(_UnderWay(plan, work))
        return bool(work)

    def _part_of_budget(self) -> Budget:
        """What one of the steps under way may hold: its part of the requests, for none to idle."""
        most = min(len(self.book), self._budget.max_sequences)
        return replace(self._budget, max_shares=-(-most // self._executor.depth))

    def _wait(self) -> bool:
        """Sleeps until there is work, or it is time to look around; False once stopped."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_stopped or self.book or self._arrived, _LOOK_S)
            return not self._is_stopped

    def _admit(self) -> None:
        """Takes in what has come, and ends what is no longer wanted or has no time left.

        What a step has a part of ends once the step is done.
        """
        with self._wake:
            arrived, self._arrived = self._arrived, []
            self.book.add(arrived)
            cancelled = [state for number in self._cancelled if (state := self.book.get(number))]
            self._cancelled = {state.id for state in cancelled if state.is_busy}
        self._end([state.id for state in cancelled if not state.is_busy], "abort")
        self._end(self.book.late(self._clock.now_s()), "timeout")

    def _emit(self, plan: StepPlan, result: StepResult) -> None:
        """Takes up what a step gave."""
        events: list[Event] = []
        for share in plan.shares:
            state = self.book.computed(share)
            state.scores.extend(result.prompt_logprobs.get(state.id, ()))
            if state.id in result.failed:
                events.append(Event(state, None, "error", result.failed[state.id]))
            elif state.id in result.sampled:
                sampled = result.sampled[state.id]
                prompt = () if state.num_generated else tuple(state.scores)
                events.append(Event(state, sampled, state.add(sampled), prompt=prompt))
        for event in events:
            if event.reason is not None:
                self._forget(event.state.id)
        self._outlet.put(events)

    def _end(self, request_ids: Sequence[int], reason: FinishReason, error: str = "") -> None:
        ended = [self._forget(request_id) for request_id in request_ids]
        self._outlet.put([Event(state, None, reason, error) for state in ended])

    def _forget(self, request_id: int) -> RequestState:
        self._executor.release(request_id)
        return self.book.end(request_id)

    def _end_all(self, reason: FinishReason, error: str = "") -> None:
        self._end([state.id for state in self.book.open()], reason, error)

    def _tell(self, work: Sequence[Work]) -> None:
        """Whoever observes learns what a step has computed, and who runs and waits after it."""
        if self._observer is not None:
            self._observer.stepped(step_of(work, self.book))

    def _begin_anew(self, error: ExecutorLostError) -> None:
        """What computes is gone: those who wait for it are told, and it is started again."""
        _log.error("%s; it is started again\n%s", error, error.last_words)
        self.is_restarting = True
        self._under_way.clear()
        self._end_all("error", str(error))
        self.book.forget_blocks()
        self._executor.restart()
        self.is_restarting = False

    def _begun(
        self, number: int, request: Request, on_delta: Callable[[Delta], None]
    ) -> RequestState:
        own = () if request.ignore_eos else self.tokenizer.eos_ids
        end_ids = frozenset((*own, *request.stop_ids))
        return RequestState(
            id=number,
            request=request,
            arrival_s=self._clock.now_s(),
            text=AnswerText(self.tokenizer, request.stop, on_delta, end_ids, request.min_tokens),
            end_ids=end_ids,
            root=root_of(request),
            tokens=list(request.prompt_ids),
        )


def root_of(request: Request) -> Key:
    """Where the names of a request's blocks begin."""
    return root(request.tenant, request.adapter)


def join(deltas: Sequence[Delta]) -> Answer:
    """The whole answer from its parts."""
    finish_reason = deltas[-1].finish_reason
    assert finish_reason is not None, "an answer without an end"
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=finish_reason,
        error=deltas[-1].error,
        logprobs=tuple(one for delta in deltas for one in delta.sampled),
        prompt_logprobs=tuple(one for delta in deltas for one in delta.prompt),
    )
