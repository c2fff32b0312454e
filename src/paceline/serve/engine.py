"""The serving loop: admit, schedule, run, emit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from paceline.core.clock import Clock, WallClock
from paceline.core.errors import PacelineError
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.adapters import adapt, resolve_adapted
from paceline.models.fuse import fuse
from paceline.models.hub import ModelSource
from paceline.models.tokenizer import Tokenizer
from paceline.models.weights import build, fill
from paceline.plan import check
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.serve.executor.base import Executor, StepResult, Work
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.request import Delta, FinishReason, Request, RequestState, require_servable
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget, Policy, RequestView, StepPlan

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer.

    Attributes:
        text: without stop strings.
        token_ids: all sampled tokens, the one that ended it included.
        finish_reason: ``stop`` or ``length``.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


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
    ) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        self._executor, self._policy, self._budget = executor, policy, budget
        self._clock = clock or WallClock()
        self._requests: dict[int, RequestState] = {}  # in order of arrival
        self._arrived: list[RequestState] = []
        self._cancelled: set[int] = set()
        self._next_id = 0
        self._wake = threading.Condition()
        self._is_stopped = False
        self._failure: Exception | None = None

    @classmethod
    def load(
        cls, model: str | ModelSource, plan: Plan | None = None, *, device: str = "auto"
    ) -> Engine:
        """An engine for a MODEL, as a plan's ``[serve]`` says.

        Raises:
            ConfigError: the plan cannot be served.
            UsageError: no such model.
        """
        plan = plan or Plan()
        source = resolve_adapted(model) if isinstance(model, str) else model
        check.require(plan, source.spec)
        where = choose_device(device)
        decoder = build(source.spec, choose_dtype(plan.serve.dtype, where))
        fill(decoder, adapt(decoder, source), where)
        fuse(decoder)
        room = source.spec.max_positions - decoder.num_virtual_tokens
        return cls(
            LocalExecutor(decoder),
            POLICIES.load(plan.serve.policy),
            Budget(plan.serve.max_batch_tokens, plan.serve.max_sequences),
            replace(source.spec, max_positions=room),
            source.tokenizer,
        )

    # For callers, from any thread

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> int:
        """Hands in a request; its answer comes through `on_delta`, on the engine's thread.

        Returns:
            The request's id.

        Raises:
            RequestError: the model cannot answer it.
            PacelineError: the engine has stopped or failed.
        """
        require_servable(request, self.spec)
        with self._wake:
            if self._is_stopped or self._failure:
                raise PacelineError("the engine has stopped")
            number, self._next_id = self._next_id, self._next_id + 1
            now_s = self._clock.now_s()
            state = RequestState.start(number, request, now_s, on_delta, self.tokenizer)
            self._arrived.append(state)
            self._wake.notify()
        return number

    def cancel(self, request_id: int) -> None:
        """Ends a request that is no longer wanted; one that has ended is left alone."""
        with self._wake:
            self._cancelled.add(request_id)
            self._wake.notify()

    def stop(self) -> None:
        """Ends `serve` after the step that it is in; open requests are aborted."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """Answers requests on this thread, in their order."""
        requests = list(requests)
        for request in requests:
            require_servable(request, self.spec)  # all of them, before the first is begun
        answers: list[list[Delta]] = []
        for request in requests:
            deltas: list[Delta] = []
            self.submit(request, deltas.append)
            answers.append(deltas)
        self.drain()
        return [join(deltas) for deltas in answers]

    def drain(self) -> None:
        """Computes steps on this thread until every request has ended."""
        while self._requests or self._arrived:
            self.step()

    @property
    def is_healthy(self) -> bool:
        """Whether requests are being taken."""
        return not (self._is_stopped or self._failure)

    # The loop

    def serve(self) -> None:
        """Runs until `stop`; a failure ends every open request with an error, then is raised."""
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

    def step(self) -> None:
        """Admits what has come, and computes one step of what the policy chooses."""
        self._admit()
        view = [_view(state) for state in self._requests.values()]
        plan = self._policy(view, self._budget, self._clock.now_s())
        if plan.shares:
            result = self._executor.run(self._work(plan))
            self._emit(plan, result)

    def _wait(self) -> bool:
        """Sleeps until there is work; False once stopped."""
        with self._wake:
            self._wake.wait_for(lambda: self._is_stopped or self._requests or self._arrived)
            return not self._is_stopped

    def _admit(self) -> None:
        with self._wake:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, set()
        self._requests |= {state.id: state for state in arrived}
        for request_id in cancelled & self._requests.keys():
            self._end(request_id, Delta("", (), "abort"))

    def _work(self, plan: StepPlan) -> list[Work]:
        step: list[Work] = []
        for share in plan.shares:
            state = self._requests[share.request_id]
            start, end = state.num_computed, state.num_computed + share.num_tokens
            is_last = end == len(state.tokens)
            sampling = state.request.sampling if is_last else None
            step.append(Work(state.id, tuple(state.tokens[start:end]), start, sampling))
        return step

    def _emit(self, plan: StepPlan, result: StepResult) -> None:
        for share in plan.shares:
            state = self._requests[share.request_id]
            state.num_computed += share.num_tokens
            if state.id in result.sampled:
                delta = state.add_token(result.sampled[state.id])
                if delta.finish_reason:
                    self._end(state.id, delta)
                else:
                    self._hand_over(state, delta)

    def _end(self, request_id: int, delta: Delta) -> None:
        self._executor.release(request_id)
        self._hand_over(self._requests.pop(request_id), delta)

    def _hand_over(self, state: RequestState, delta: Delta) -> None:
        """Gives a part to whoever asked; a receiver that fails harms nobody else's request."""
        try:
            state.on_delta(delta)
        except Exception:
            _log.exception("the receiver of request %d failed; it is cancelled", state.id)
            self.cancel(state.id)

    def _end_all(self, reason: FinishReason) -> None:
        for request_id in list(self._requests):
            self._end(request_id, Delta("", (), reason))


def _view(state: RequestState) -> RequestView:
    return RequestView(state.id, state.arrival_s, state.num_computed, len(state.tokens))


def join(deltas: Sequence[Delta]) -> Answer:
    """The whole answer from its parts."""
    finish_reason = deltas[-1].finish_reason
    assert finish_reason is not None, "an answer without an end"
    return Answer(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=finish_reason,
    )
