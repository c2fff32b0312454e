"""Greedy decoding at batch 1, beside `transformers` on the same weights, dtype and threads.

The limit is the measured rate of reading memory over the bytes of the weights: each token reads
every weight once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from paceline.bench.outcome import Outcome, interleave, outcome
from paceline.bench.peer import load_peer, require_peer
from paceline.decode.sampler import SamplingParams
from paceline.kernels.device import choose_device, choose_dtype
from paceline.plan.plan import Plan
from paceline.serve.engine import Engine
from paceline.serve.load import load_engine
from paceline.serve.request import Request

PROMPT = "A paceline is a line of riders who take turns at the front, so that"
NUM_TOKENS = 48
_READ_BYTES = 1 << 29
_READ_TRIALS = 5


def run(
    *, against: str = "transformers", model: str = "smollm2-135m", dtype: str = "auto"
) -> Outcome:
    """Tokens per second of both sides, the prompt's computation included."""
    peer = require_peer(against, model)
    compute = choose_dtype(dtype, choose_device("cpu"))
    name = str(compute).removeprefix("torch.")
    engine = load_engine(model, Plan().with_overrides([f'serve.dtype="{name}"']), device="cpu")
    prompt_ids = engine.tokenizer.encode(PROMPT)
    theirs = _peers(load_peer(model, compute), prompt_ids)
    rates = interleave(_ours(engine, prompt_ids), theirs)
    read_bytes_per_s = read_bandwidth()
    return outcome(
        f"generate, batch 1, {NUM_TOKENS} greedy tokens, {name}",
        *rates,
        against=peer,
        limit=read_bytes_per_s / engine.spec.parameter_bytes(name),
        limited_by=f"{read_bytes_per_s / 1e9:.1f} GB/s read over the bytes of the weights",
    )


def _ours(engine: Engine, prompt_ids: list[int]) -> Callable[[], float]:
    request = Request(
        prompt_ids=tuple(prompt_ids),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )

    def measure() -> float:
        start_s = time.perf_counter()
        engine.generate([request])
        return NUM_TOKENS / (time.perf_counter() - start_s)

    return measure


def _peers(peer: Any, prompt_ids: list[int]) -> Callable[[], float]:
    tokens_BT = torch.tensor([prompt_ids])

    def measure() -> float:
        start_s = time.perf_counter()
        peer.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        return NUM_TOKENS / (time.perf_counter() - start_s)

    return measure


def read_bandwidth() -> float:
    """Bytes per second at which a sum reads memory, the best of a few."""
    values = torch.ones(_READ_BYTES // 4)
    times: list[float] = []
    for _ in range(_READ_TRIALS):
        start_s = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - start_s)
    return _READ_BYTES / min(times)
