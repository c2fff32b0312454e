"""Bench: what adapters beside each other cost, in a batch whose rows have different ones.

Each request of one side has one of eight adapters of rank 16 on all linear layers; the requests of
the other have none. Prompts are of a token, so that nearly all steps are of one row a request.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from paceline.bench.outcome import MIN_PAIRS, Outcome, interleave, outcome
from paceline.core.errors import UnknownNameError
from paceline.decode.sampler import SamplingParams
from paceline.kernels.device import choose_device, choose_dtype
from paceline.models.hub import ModelSource, resolve
from paceline.models.peft.attach import attach
from paceline.models.peft.files import write_adapter
from paceline.models.weights import build
from paceline.plan.plan import PeftConfig, Plan
from paceline.serve.engine import Engine
from paceline.serve.load import load_engine
from paceline.serve.request import Request

PEER = "base"
NUM_ADAPTERS = 8
NUM_REQUESTS = 32
NUM_TOKENS = 8
_CONFIG = PeftConfig(method="lora", rank=16, alpha=16.0)
_STD = 0.01


def run(*, against: str = PEER, model: str = "smollm2-135m", dtype: str = "auto") -> Outcome:
    """Tokens per second of requests with adapters, beside those of the same requests without.

    Raises:
        UnknownNameError: another peer.
    """
    if against != PEER:
        raise UnknownNameError("peer", against, [PEER])
    return measure(resolve(model), dtype, MIN_PAIRS)


def measure(source: ModelSource, dtype: str, pairs: int) -> Outcome:
    """Both sides on one engine, in turns.

    Args:
        source: of the model.
        dtype: of weights and activations.
        pairs: of windows.
    """
    name = str(choose_dtype(dtype, choose_device("cpu"))).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="paceline-adapters-") as folder:
        engine = load_engine(source, _plan(source, Path(folder), name), device="cpu")
    with_adapters, without = interleave(_side(engine, engine.adapters), _side(engine, [""]), pairs)
    return outcome(
        f"{NUM_REQUESTS} requests with {NUM_ADAPTERS} adapters of rank {_CONFIG.rank}, {name}",
        with_adapters,
        without,
        against="the same requests without adapters",
        limit=statistics.median(without),
        limited_by="the rate without adapters",
    )


def _plan(source: ModelSource, folder: Path, dtype: str) -> Plan:
    """A plan with random adapters, whose files are written."""
    shapes = build(source.spec)
    names = attach(shapes, _CONFIG, source.weights).added
    generator = torch.Generator().manual_seed(0)
    settings = [f'serve.dtype="{dtype}"', f"serve.max_sequences={NUM_REQUESTS}"]
    for number in range(NUM_ADAPTERS):
        path = folder / f"adapter-{number}"
        path.mkdir()
        tensors = {
            name: _STD * torch.randn(shapes.get_parameter(name).shape, generator=generator)
            for name in sorted(names)
        }
        write_adapter(path, source.spec, _CONFIG, source.name, tensors)
        settings.append(f"serve.adapters.{path.name}={path}")
    return Plan().with_overrides(settings)


def _side(engine: Engine, adapters: Sequence[str]) -> Callable[[], float]:
    """Measures the rate of requests that have the adapters in turn."""
    requests = [
        Request(
            prompt_ids=(number,),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            adapter=adapters[number % len(adapters)],
        )
        for number in range(NUM_REQUESTS)
    ]

    def measure() -> float:
        start_s = time.perf_counter()
        engine.generate(requests)
        return NUM_REQUESTS * NUM_TOKENS / (time.perf_counter() - start_s)

    return measure
