"""Bench: what it costs to be watched, in a training step of two ranks.

One side has its collectives written down in a ring, a heartbeat, and a watcher that judges; the
other has none of it. Steps are the same, taken in turns in one run. The watcher is a thread of the
first rank's process: in a run the launcher has it, and its time is not even the rank's.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed

from paceline.bench.outcome import Outcome, outcome
from paceline.bench.ranks import SharedWeights, our_step, random_batches
from paceline.core.errors import UnknownNameError
from paceline.dist.ring import Ring, ring_path
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.kernels.device import keep_freed_memory
from paceline.models.families.llama import PRESETS
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan, ZeroConfig
from paceline.resilience.verdict import Verdict
from paceline.resilience.watch import Watcher

PEER = "unwatched"
NUM_RANKS = 2
NUM_PAIRS = 41
_STEPS = 4
_SHAPE = (2, 2, 128)
_PATIENCE = 20.0
_TIMEOUT_S = 600.0


class _Measured(NamedTuple):
    """Rates of both sides, and verdicts that there should be none of."""

    ours: list[float]
    peer: list[float]
    verdicts: list[Verdict]


def run(against: str = PEER) -> Outcome:
    """Measures watched steps beside unwatched ones.

    Raises:
        UnknownNameError: another peer.
    """
    if against != PEER:
        raise UnknownNameError("peer", against, [PEER])
    return measure(PRESETS["small"], NUM_PAIRS)


def measure(spec: ModelSpec, pairs: int) -> Outcome:
    """Tokens per second of both sides, of two ranks that shard the optimizer's state.

    Args:
        spec: of the model.
        pairs: of windows of steps.
    """
    plan = Plan(mesh=MeshConfig(dp_shard=NUM_RANKS), zero=ZeroConfig(stage=1))
    weights = SharedWeights(spec)
    with tempfile.TemporaryDirectory(prefix="paceline-watch-") as folder:
        work = partial(_work, Path(folder), spec, weights, plan, pairs)
        found: _Measured = run_ranks(work, NUM_RANKS, timeout_s=_TIMEOUT_S, mesh=plan.mesh)[0]
    assert not found.verdicts, f"a clean run raises an alarm: {found.verdicts}"
    unwatched = statistics.median(found.peer)
    result = outcome(
        f"watched training, {spec.num_parameters / 1e6:.1f} M parameters, zero 1, float32",
        found.ours,
        found.peer,
        against="the same steps, unwatched",
        limit=unwatched,
        limited_by="the rate of unwatched steps",
    )
    device = f"{platform.machine()} CPU, {NUM_RANKS} gloo ranks of one thread"
    return replace(result, device=device)


def _work(
    folder: Path, spec: ModelSpec, weights: SharedWeights, plan: Plan, pairs: int, rank: int
) -> _Measured:
    """One rank's part of both sides."""
    keep_freed_memory()
    world = World(plan.mesh, rank, torch.device("cpu"))
    batches = random_batches(spec, _SHAPE, seed=rank)
    step = our_step(spec, weights, plan, world, batches)
    count, sequences, length = _SHAPE
    num_tokens = _STEPS * count * sequences * length * NUM_RANKS
    verdicts: list[Verdict] = []

    def window() -> float:
        torch.distributed.barrier()
        start_s = time.perf_counter()
        for number in range(1, _STEPS + 1):
            step()
            world.finish_step(number)
        torch.distributed.barrier()
        return num_tokens / (time.perf_counter() - start_s)

    def watched() -> float:
        with _watched(world, folder, verdicts.append):
            return window()

    for _ in range(2):
        watched()
        window()
    # Either side comes first in every other pair: a machine that slows down favours neither.
    ours: list[float] = []
    peer: list[float] = []
    for pair in range(pairs):
        sides = [(ours, watched), (peer, window)]
        for rates, side in sides if pair % 2 else reversed(sides):
            rates.append(side())
    return _Measured(ours, peer, verdicts)


@contextmanager
def _watched(world: World, folder: Path, on_verdict: Callable[[Verdict], None]) -> Generator[None]:
    """Has a world's collectives written down, and on the first rank judged."""
    watcher = Watcher(folder, world.mesh, _PATIENCE, on_verdict)
    if world.is_first:
        watcher.start()
    ring = Ring(ring_path(folder, world.rank), world.mesh, world.rank)
    ring.begin_training()
    world.traffic.ring = ring
    try:
        yield
    finally:
        world.traffic.ring = None
        ring.close("done")
        watcher.stop()
