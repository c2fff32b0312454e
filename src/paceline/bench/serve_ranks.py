"""An engine over two ranks of one thread each, beside one process with as many threads.

And stages that work at different steps at a time, beside stages that wait for each other.

Source: Du et al., EnergonAI, arXiv:2209.02341 (non-blocking against blocking pipelines).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from paceline.bench.outcome import Outcome, interleave, outcome
from paceline.decode.sampler import SamplingParams
from paceline.kernels.device import choose_device, choose_dtype
from paceline.plan.plan import Plan
from paceline.serve.engine import Engine
from paceline.serve.load import load_engine
from paceline.serve.request import Request

NUM_REQUESTS = 16
NUM_TOKENS = 24
PROMPT = "A paceline is a line of riders who take turns at the front, so that"
_TWO_STAGES = 2.0


def run(*, model: str = "smollm2-135m", dtype: str = "float32") -> dict[str, Outcome]:
    """Output tokens per second of many requests at a time."""
    name = str(choose_dtype(dtype, choose_device("cpu"))).removeprefix("torch.")
    one = _engine(model, name)
    prompt_ids = tuple(one.tokenizer.encode(PROMPT))
    requests = [_request((*prompt_ids, number)) for number in range(NUM_REQUESTS)]
    what = f"{NUM_REQUESTS} requests of {NUM_TOKENS} greedy tokens, {name}"
    found: dict[str, Outcome] = {}
    for axis in ("tp", "pp"):
        ranks = _engine(model, name, f"serve.mesh.{axis}=2")
        rates = interleave(_rate(ranks, requests), _rate(one, requests))
        found[axis] = _beside_one(f"serve, {axis} = 2, {what}", *rates)
        ranks.close()
    found["non-blocking"] = _beside_blocking(model, name, requests, what)
    return found


def _beside_one(name: str, ours: list[float], peer: list[float]) -> Outcome:
    num_threads = os.cpu_count()
    against = f"one process, {num_threads} threads"
    return outcome(
        name,
        ours,
        peer,
        against=against,
        limit=max(peer),
        limited_by="the same cores without a word between them",
    )


def _beside_blocking(model: str, dtype: str, requests: Sequence[Request], what: str) -> Outcome:
    """Two stages, as many steps under way, beside one step under way."""
    free = _engine(model, dtype, "serve.mesh.pp=2")
    blocking = _engine(model, dtype, "serve.mesh.pp=2", depth=1)
    ours, peer = interleave(_rate(free, requests), _rate(blocking, requests))
    free.close()
    blocking.close()
    return outcome(
        f"serve, pp = 2, two steps under way, {what}",
        ours,
        peer,
        against="the same with one step under way (blocking)",
        limit=_TWO_STAGES * max(peer),
        limited_by="twice the peer's best: two stages that never wait",
    )


def _engine(model: str, dtype: str, *settings: str, depth: int | None = None) -> Engine:
    plan = Plan().with_overrides([f'serve.dtype="{dtype}"', *settings])
    return load_engine(model, plan, device="cpu", depth=depth)


def _request(prompt_ids: tuple[int, ...]) -> Request:
    return Request(
        prompt_ids=prompt_ids,
        sampling=SamplingParams(temperature=0.0),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )


def _rate(engine: Engine, requests: Sequence[Request]) -> Callable[[], float]:
    def measure() -> float:
        start_s = time.perf_counter()
        engine.generate(requests)
        return NUM_TOKENS * len(requests) / (time.perf_counter() - start_s)

    return measure
