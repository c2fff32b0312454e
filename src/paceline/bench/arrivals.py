"""Recorded requests, and their replay on an engine at the times at which they come.

The recording (``arrivals.json``) holds lengths, gaps and the seed that they were drawn with; gaps
are in units of the mean one, so that one recording serves every rate.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from paceline.core import rng
from paceline.decode.sampler import SamplingParams
from paceline.serve.engine import Engine
from paceline.serve.request import Delta, Request

RECORDING = Path(__file__).with_name("arrivals.json")
SEED = 7


class Arrival(NamedTuple):
    """A request of a recording.

    Attributes:
        gap: to the one before it, in mean gaps.
        num_prompt: tokens of its prompt.
        num_answer: tokens of its answer.
    """

    gap: float
    num_prompt: int
    num_answer: int


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay took.

    Attributes:
        rate: tokens of answers a second, until the last of them.
        steady_rate: until three quarters of them are there, while most seats are taken.
        gaps_s: between tokens of one answer, of all answers.
    """

    rate: float
    steady_rate: float
    gaps_s: list[float]

    def gap_s(self, share: float) -> float:
        """The gap that this share of all gaps does not exceed."""
        ordered = sorted(self.gaps_s)
        return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def read_recording() -> dict[str, list[Arrival]]:
    """The recordings by name."""
    recorded = json.loads(RECORDING.read_text())
    return {name: [Arrival(*each) for each in recorded[name]] for name in ("mixed", "poisson")}


def draw_recording(seed: int = SEED) -> dict[str, object]:
    """What is recorded.

    ``mixed``: answers of equal lengths, one prompt of eight a long one. ``poisson``: short prompts,
    one answer of eight a long one. Both come as a Poisson process.
    """

    def draw(name: str, count: int, long: tuple[int, int], short: tuple[int, int]) -> list[Arrival]:
        waits = [-math.log(u) for u in rng.uniform(count, seed=seed, purpose="gaps", stream=name)]
        spread = rng.uniform(count, seed=seed, purpose="lengths", stream=name)
        found: list[Arrival] = []
        for place in range(count):
            prompt, answer = long if place % 8 == 3 else short
            share = 0.75 + 0.5 * float(spread[place])
            gap = round(waits[place] * count / sum(waits), 4)
            found.append(Arrival(gap, int(prompt * share), int(answer * share)))
        return found

    return {
        "seed": seed,
        "mixed": draw("mixed", 24, (1200, 32), (40, 32)),
        "poisson": draw("poisson", 192, (12, 64), (12, 4)),
    }


def prompt_ids(place: int, length: int, vocab_size: int) -> tuple[int, ...]:
    """A prompt that shares nothing with others."""
    words = rng.bits(length, seed=SEED, purpose="prompt", stream=place)
    return tuple(int(word) % vocab_size for word in words)


def requests_of(arrivals: Sequence[Arrival], vocab_size: int, tenant: str) -> list[Request]:
    """The recording's requests, whose answers have the recorded lengths."""
    return [
        Request(
            prompt_ids=prompt_ids(place, arrival.num_prompt, vocab_size),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=arrival.num_answer,
            ignore_eos=True,
            tenant=tenant,
        )
        for place, arrival in enumerate(arrivals)
    ]


def replay(
    engine: Engine, arrivals: Sequence[Arrival], requests_per_s: float, tenant: str
) -> Replayed:
    """Asks at the recorded times on this thread's engine, and hears all answers.

    Args:
        engine: that nobody else uses.
        arrivals: recorded.
        requests_per_s: mean rate at which they come; infinite for all at once.
        tenant: who asks; new in each replay, so that nothing is found in the cache.
    """
    requests = requests_of(arrivals, engine.spec.vocab_size, tenant)
    times_s: list[list[float]] = [[] for _ in requests]
    due_s = 0.0
    start_s = time.perf_counter()
    for request, arrival, heard_s in zip(requests, arrivals, times_s, strict=True):
        due_s += arrival.gap / requests_per_s
        _step_until(engine, start_s + due_s)
        engine.submit(request, _hear(heard_s))
    engine.drain()
    heard_s = sorted(time_s - start_s for heard in times_s for time_s in heard)
    most = 3 * len(heard_s) // 4
    return Replayed(
        rate=len(heard_s) / heard_s[-1],
        steady_rate=most / heard_s[most - 1],
        gaps_s=[b - a for heard in times_s for a, b in pairwise(heard)],
    )


def _hear(times_s: list[float]) -> Callable[[Delta], None]:
    def hear(delta: Delta) -> None:
        times_s.extend([time.perf_counter()] * len(delta.token_ids))

    return hear


def _step_until(engine: Engine, due_s: float) -> None:
    """Computes steps, or sleeps where there is nothing to compute."""
    while (left_s := due_s - time.perf_counter()) > 0:
        engine.step()  # takes in what was asked, if nothing else
        if not engine.book:
            time.sleep(left_s)
