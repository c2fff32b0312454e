"""Engines for tests: a real tiny model, or an executor that follows a script."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from paceline.core.clock import VirtualClock
from paceline.decode.sampler import Sampled, SamplingParams
from paceline.models.decoder import Decoder
from paceline.models.families.llama import PRESETS
from paceline.models.tokenizer import byte_tokenizer
from paceline.models.weights import RandomWeights, build, fill
from paceline.serve.engine import Engine
from paceline.serve.executor.base import Executor, OneAtATime, StepResult, Work
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.load import BLOCK_SIZE
from paceline.serve.request import Delta, Request
from paceline.serve.schedule.base import Budget, Policy
from paceline.serve.schedule.serial import serial
from paceline.serve.schedule.stall_free import stall_free

TOKENIZER = byte_tokenizer()
SPEC = replace(PRESETS["tiny"], max_positions=100_000)
GREEDY = SamplingParams(temperature=0)


@functools.cache
def _model() -> Decoder:
    """A tiny random model whose logits are of size 1, so that prompts and caches matter."""
    spec = replace(PRESETS["tiny"], initializer_std=0.15)
    model = build(spec)
    fill(model, RandomWeights(spec), torch.device("cpu"))
    return model


def real_engine(
    policy: Policy = stall_free,
    *,
    max_batch_tokens: int = 512,
    max_sequences: int = 8,
    num_blocks: int = 256,
) -> Engine:
    """A new engine around that model, in float32."""
    budget = Budget(max_batch_tokens, max_sequences)
    executor = LocalExecutor(_model(), num_blocks, BLOCK_SIZE)
    return Engine(executor, policy, budget, _model().spec, TOKENIZER)


class Scripted(OneAtATime):
    """Says `text`, then "a" for ever.

    Args:
        text: what every answer begins with.
        step_s: how long a step takes.
        fail_at: which of the steps fails, counted from 1.
    """

    num_blocks, block_size = 10_000, 16

    def __init__(self, text: str = "", *, step_s: float = 0.0, fail_at: int = 0) -> None:
        super().__init__()
        self.ids = TOKENIZER.encode(text)
        self.steps: list[list[Work]] = []
        self.released: list[int] = []
        self._step_s, self._fail_at = step_s, fail_at
        self._prompt_ends: dict[int, int] = {}

    def run(self, step: Sequence[Work]) -> StepResult:
        self.steps.append(list(step))
        time.sleep(self._step_s)
        if len(self.steps) == self._fail_at:
            raise RuntimeError("the device is on fire")
        sampled = {}
        for work in step:
            if work.draw is not None:
                end = work.start + len(work.tokens)
                place = end - self._prompt_ends.setdefault(work.request_id, end)
                is_scripted = place < len(self.ids)
                token = self.ids[place] if is_scripted else encode("a")[0]
                sampled[work.request_id] = Sampled(token)
        return StepResult(sampled)

    def release(self, request_id: int) -> None:
        self.released.append(request_id)

    def restart(self) -> None:
        pass

    def close(self) -> None:
        pass


def scripted_engine(executor: Executor, *, max_batch_tokens: int = 2048) -> Engine:
    """An engine around an executor, with room for long answers."""
    budget = Budget(max_batch_tokens, 1)
    return Engine(executor, serial, budget, SPEC, TOKENIZER, clock=VirtualClock())


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text))


def ask(prompt: str = "hi", *, max_tokens: int = 20, seed: int | None = None, **options) -> Request:
    """A request, greedy unless it has a seed."""
    sampling = GREEDY if seed is None else SamplingParams(temperature=1.0, seed=seed)
    return Request(prompt_ids=encode(prompt), sampling=sampling, max_tokens=max_tokens, **options)


class Listener:
    """Collects an answer's deltas, from whatever thread they come."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self._news = threading.Condition()

    def __call__(self, delta: Delta) -> None:
        with self._news:
            self.deltas.append(delta)
            self._news.notify_all()

    def wait_for(self, is_enough: Callable[[list[Delta]], bool]) -> list[Delta]:
        with self._news:
            assert self._news.wait_for(lambda: is_enough(self.deltas), timeout=20)
        return self.deltas

    def wait_for_end(self) -> list[Delta]:
        return self.wait_for(lambda deltas: bool(deltas) and deltas[-1].finish_reason is not None)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


@contextmanager
def serving(engine: Engine) -> Generator[list[BaseException]]:
    """Runs the engine's loop on a thread; gives what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            engine.serve()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        engine.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()
