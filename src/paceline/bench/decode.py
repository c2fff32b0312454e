"""A decode step of many sequences, beside `transformers` on the same weights, dtype and threads.

Every sequence has about `CONTEXT` tokens; a step gives each of them one more, greedily. The limit
is what the slower of two takes: reading all weights and all keys and values at the measured rate
of memory, or the step's products at the measured rate of large ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from paceline.bench.generate import read_bandwidth
from paceline.bench.outcome import Outcome, interleave, outcome
from paceline.bench.peer import load_peer, require_peer
from paceline.decode.sampler import Draw, SamplingParams
from paceline.kernels.device import choose_device, choose_dtype, measure_peak_flops
from paceline.plan.model_spec import DTYPE_BYTES, ModelSpec
from paceline.plan.plan import Plan
from paceline.serve.executor.base import Executor, Work
from paceline.serve.load import BLOCK_SIZE, load_engine

CONTEXT = 256
NUM_SEQUENCES = (1, 8, 32)
_STEPS = 4  # of one measurement
_ROOM_TOKENS = 64


def run(
    *, against: str = "transformers", model: str = "smollm2-135m", dtype: str = "auto"
) -> dict[str, Outcome]:
    """Tokens per second of steps of 1, 8 and 32 sequences; keys are the numbers of sequences."""
    peer = require_peer(against, model)
    cpu = choose_device("cpu")
    compute = choose_dtype(dtype, cpu)
    name = str(compute).removeprefix("torch.")
    plan = Plan().with_overrides([f'serve.dtype="{name}"'])
    engine, theirs = load_engine(model, plan, device="cpu"), load_peer(model, compute)
    read_bytes_per_s, flops = read_bandwidth(), measure_peak_flops(cpu, compute)
    found: dict[str, Outcome] = {}
    for count in NUM_SEQUENCES:
        tokens_BT = _tokens(count, engine.spec.vocab_size)
        rates = interleave(_ours(engine._executor, tokens_BT), _peers(theirs, tokens_BT))
        found[str(count)] = outcome(
            f"decode step, {count} sequences of {CONTEXT} tokens, {name}",
            *rates,
            against=peer,
            limit=count / _least_s(engine.spec, name, count, read_bytes_per_s, flops),
            limited_by=f"{read_bytes_per_s / 1e9:.1f} GB/s of weights, keys and values; "
            f"{flops / 1e9:.0f} GFLOP/s",
        )
    return found


def _least_s(
    spec: ModelSpec, dtype: str, count: int, read_bytes_per_s: float, flops: float
) -> float:
    """What a step takes at the machine's rates."""
    kv_width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    kv_bytes = count * CONTEXT * kv_width * DTYPE_BYTES[dtype]
    num_parameters = spec.parameter_bytes(dtype) / DTYPE_BYTES[dtype]
    read_s = (spec.parameter_bytes(dtype) + kv_bytes) / read_bytes_per_s
    return max(read_s, 2.0 * num_parameters * count / flops)


def _tokens(count: int, num_words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(num_words, (count, CONTEXT), generator=generator)


def _ours(executor: Executor, tokens_BT: torch.Tensor) -> Callable[[], float]:
    """Steps of the executor that an engine has; each measurement goes on from `CONTEXT` tokens."""
    count = len(tokens_BT)
    table_length = (CONTEXT + _ROOM_TOKENS) // BLOCK_SIZE
    for index, tokens in enumerate(tokens_BT.tolist()):
        executor.release(index)
        blocks = range(index * table_length, (index + 1) * table_length)
        executor.run([Work(index, tuple(tokens), 0, tuple(blocks), None)])

    def measure() -> float:
        start_s = time.perf_counter()
        last = [0] * count
        for place in range(CONTEXT, CONTEXT + _STEPS):
            draw = Draw(SamplingParams(temperature=0.0), place + 1)
            step = [Work(i, (token,), place, (), draw) for i, token in enumerate(last)]
            sampled = executor.run(step).sampled
            last = [sampled[index].token for index in range(count)]
        return count * _STEPS / (time.perf_counter() - start_s)

    return measure


def _peers(peer: Any, tokens_BT: torch.Tensor) -> Callable[[], float]:
    """Steps of a batch through the peer's own cache, which each measurement goes on from."""
    count = len(tokens_BT)
    with torch.inference_mode():
        cache = peer(tokens_BT, use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def measure() -> float:
        start_s = time.perf_counter()
        last_B1 = torch.zeros(count, 1, dtype=torch.int64)
        for _ in range(_STEPS):
            found = peer(last_B1, past_key_values=cache, use_cache=True)
            last_B1 = found.logits[:, -1:].argmax(-1)
        rate = count * _STEPS / (time.perf_counter() - start_s)
        cache.crop(CONTEXT)
        return rate

    return measure
