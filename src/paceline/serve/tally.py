"""Counts what an engine does: plain numbers, which other threads may read at any time."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

from paceline.core.clock import Clock, WallClock
from paceline.plan.model_spec import ModelSpec
from paceline.serve.observe import Step
from paceline.serve.request import Delta, RequestState

SECONDS = (*(digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)), 1000.0)
"""Upper bounds of the buckets of times: three a decade, from a millisecond on."""
TOKENS = tuple(float(1 << power) for power in range(15))
"""Upper bounds of the buckets of a step's tokens."""


class Histogram:
    """How often values fell between bounds.

    Args:
        bounds: upper ones, each its bucket's; beyond the last there is one more bucket.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class _Pace:
    """When the tokens of a request's answer came."""

    first_s: float
    last_s: float
    num_tokens: int


class Tally:
    """An observer that counts.

    Each number has one thread that writes it: the engine's those of steps, the outlet's the others.

    Args:
        spec: of the model, for the work that steps are.
        dtype: of its weights, keys and values.
        clock: the engine's.

    Attributes:
        step: the newest; None before the first.
        num_steps: how many there were.
        flops: an estimate of what they multiplied and added.
        read_bytes: an estimate of what they read: all weights once a step, and keys and values.
        prompt_tokens: of requests whose answer has begun.
        generation_tokens: of answers.
        finished: how many requests ended for which reason.
    """

    def __init__(self, spec: ModelSpec, dtype: str, clock: Clock | None = None) -> None:
        self._clock = clock or WallClock()
        self._flops_per_token = spec.forward_flops_per_token(0)
        self._flops_per_score = 4.0 * spec.d_query * spec.num_layers
        self._weight_bytes = spec.parameter_bytes(dtype)
        self._kv_bytes = spec.kv_bytes_per_token(dtype)
        self.step: Step | None = None
        self.num_steps, self.flops, self.read_bytes = 0, 0.0, 0.0
        self.prompt_tokens = self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self.step_tokens = Histogram(TOKENS)
        self.to_first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(SECONDS)
        self.per_output_token = Histogram(SECONDS)
        self.whole, self.queued = Histogram(SECONDS), Histogram(SECONDS)
        self.prefill, self.decode = Histogram(SECONDS), Histogram(SECONDS)
        self._paces: dict[int, _Pace] = {}

    def stepped(self, step: Step) -> None:
        self.step = step
        if step.num_tokens:
            self.num_steps += 1
            self.step_tokens.add(step.num_tokens)
            self.flops += self._flops_per_token * step.num_tokens
            self.flops += self._flops_per_score * step.num_scores
            self.read_bytes += self._weight_bytes + self._kv_bytes * step.num_context

    def told(self, state: RequestState, delta: Delta) -> None:
        now_s = self._clock.now_s()
        if delta.token_ids:
            self._add_tokens(state, len(delta.token_ids), now_s)
        if delta.finish_reason is not None:
            self.finished[delta.finish_reason] += 1
            self._end(state, now_s)

    def _add_tokens(self, state: RequestState, count: int, now_s: float) -> None:
        self.generation_tokens += count
        pace = self._paces.get(state.id)
        if pace is None:
            self._paces[state.id] = _Pace(now_s, now_s, count)
            self.prompt_tokens += len(state.request.prompt_ids)
            self.to_first_token.add(now_s - state.arrival_s)
            if state.admitted_s is not None:
                self.queued.add(state.admitted_s - state.arrival_s)
                self.prefill.add(now_s - state.admitted_s)
            return
        for _ in range(count):  # several at once came as fast as their mean
            self.between_tokens.add((now_s - pace.last_s) / count)
        pace.last_s, pace.num_tokens = now_s, pace.num_tokens + count

    def _end(self, state: RequestState, now_s: float) -> None:
        self.whole.add(now_s - state.arrival_s)
        pace = self._paces.pop(state.id, None)
        if pace is not None:
            self.decode.add(pace.last_s - pace.first_s)
            if pace.num_tokens > 1:
                self.per_output_token.add((pace.last_s - pace.first_s) / (pace.num_tokens - 1))
