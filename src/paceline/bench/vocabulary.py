"""Words spread over a pipeline's ranks beside words on its edge stages: speed, and peak memory.

Both sides are ours, with as many layers on every rank, the same weights, batches, clip and AdamW,
in float32. They live in the same two processes of one thread each and take turns; the losses of
their first steps must agree. On edge stages the last rank has the head besides its layers, and the
others wait for it.

The limit is the rate of square matrix products of both ranks together over the FLOPs of a token.

Memory is counted, not sampled: every allocation of the CPU's allocator in a step, as torch's
profiler tells of it, on top of what a rank holds at the step's begin: parameters, gradients, the
optimizer's state, activations, and what is on its way. The figure of a rank is its largest sum.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch.profiler import ProfilerActivity, profile, record_function

from paceline.bench.outcome import MIN_PAIRS, Outcome, Ratio, interleave, outcome
from paceline.bench.ranks import SharedWeights, our_step, random_batches, timed
from paceline.core.errors import PacelineError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.kernels.device import keep_freed_memory, measure_peak_flops
from paceline.models import hub
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.check import require
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import OptimizerConfig, PipelineConfig, Plan, TrainConfig

NUM_RANKS = 2
NUM_SEQUENCES, LENGTH = 2, 128
NUM_MICROBATCHES = 8
NUM_LAYERS = 8
_LOSS_ERROR = 1e-4
_COMPARED_STEPS = 2  # the second loss tells of the first gradient
_TIMEOUT_S = 900.0
_MEASURED = "the measured step"


class _Rates(NamedTuple):
    """What one rank has measured: rates of both sides in tokens/s, losses, FLOP/s."""

    spread: list[float]
    edges: list[float]
    losses: list[tuple[float, float]]
    peak_flops: float


@dataclass(frozen=True, slots=True)
class Memory:
    """The most bytes that each rank holds in a step, state and activations together.

    Attributes:
        schedule: of the pipeline.
        spread_bytes: of each rank, words spread.
        edges_bytes: of each rank, words on edge stages.
    """

    schedule: str
    spread_bytes: tuple[int, ...]
    edges_bytes: tuple[int, ...]

    @property
    def spread_imbalance(self) -> float:
        """By how much the largest rank exceeds the smallest, words spread."""
        return max(self.spread_bytes) / min(self.spread_bytes) - 1

    @property
    def edges_imbalance(self) -> float:
        """By how much the largest rank exceeds the smallest, words on edge stages."""
        return max(self.edges_bytes) / min(self.edges_bytes) - 1


def run(
    *, model: str = "random:llama:135m", layers: int = NUM_LAYERS, pairs: int = MIN_PAIRS
) -> dict[str, Outcome]:
    """Speed under one-f-one-b, and how even peak memory is under v-half.

    Args:
        model: whose sizes are taken; weights are random.
        layers: blocks of it that are there; a multiple of the stages for even memory.
        pairs: of steps.
    """
    speed = measure(model=model, layers=layers, pairs=pairs)
    even = layers // (2 * NUM_RANKS) * 2 * NUM_RANKS or 2 * NUM_RANKS
    return {"speed": speed, "memory": _evenness(memory(model=model, layers=even), model, even)}


def _evenness(found: Memory, model: str, layers: int) -> Outcome:
    """The largest rank's peak memory over the smallest's, of both sides."""
    ours, peer = 1 + found.spread_imbalance, 1 + found.edges_imbalance
    return Outcome(
        name=f"peak memory, vocabulary spread, {found.schedule}, {model} of {layers} layers",
        unit="largest rank / smallest",
        ours=ours,
        peer=peer,
        against="vocabulary on edge stages, the same layers on both ranks",
        limit=1.0,
        limited_by="all ranks alike",
        fraction=1 / ours,
        ratios=Ratio(*[peer / ours] * 3, pairs=1),
        device="counted bytes",
    )


def measure(
    *,
    model: str = "random:llama:135m",
    layers: int = NUM_LAYERS,
    pairs: int = MIN_PAIRS,
    barriers: int = 1,
) -> Outcome:
    """Tokens per second of one-f-one-b with words spread, over those with words on edge stages.

    Args:
        model: whose sizes are taken; weights are random.
        layers: blocks of it that are there.
        pairs: of steps.
        barriers: of the spread words.

    Raises:
        PacelineError: the sides do not compute the same.
    """
    spec = _spec(model, layers)
    plans = [_plan(spec, "one-f-one-b", barriers=each) for each in (barriers, 0)]
    for plan in plans:
        require(plan, spec, num_ranks=NUM_RANKS, source="the plan of a side")
    work = partial(_rates, spec, SharedWeights(spec), plans, pairs)
    found: list[_Rates] = run_ranks(work, NUM_RANKS, timeout_s=_TIMEOUT_S, mesh=plans[0].mesh)
    for step, (spread, edges) in enumerate(found[0].losses, start=1):
        if not abs(spread - edges) <= _LOSS_ERROR * abs(edges):
            rule = f"the loss of step {step} is {spread}, on edge stages {edges}: not the same work"
            raise PacelineError(rule)
    peak = sum(rank.peak_flops for rank in found)
    tokens = f"{NUM_MICROBATCHES} x {NUM_SEQUENCES} x {LENGTH} tokens"
    result = outcome(
        f"vocabulary spread over pp {NUM_RANKS}, one-f-one-b, {model} of {spec.num_layers} layers, "
        f"{tokens}, float32",
        found[0].spread,
        found[0].edges,
        against="vocabulary on edge stages, the same layers on both ranks",
        limit=peak / spec.model_flops_per_token(LENGTH),
        limited_by=f"{peak / 1e9:.0f} GFLOP/s of matrix products over the FLOPs of a token",
    )
    device = f"{platform.machine()} CPU, {NUM_RANKS} gloo ranks of one thread"
    return replace(result, device=device)


def memory(
    *,
    model: str = "random:llama:135m",
    layers: int = NUM_LAYERS,
    schedule: str = "v-half",
    num_ranks: int = NUM_RANKS,
    barriers: int = 1,
) -> Memory:
    """Peak memory of every rank, words spread and words on edge stages.

    Args:
        model: whose sizes are taken; weights are random.
        layers: blocks of it that are there, in equal stages.
        schedule: of the pipeline.
        num_ranks: of the pipeline.
        barriers: of the spread words.
    """
    spec = _spec(model, layers)
    weights = SharedWeights(spec)
    found: list[tuple[int, ...]] = []
    for each in (barriers, 0):
        plan = _plan(spec, schedule, num_ranks=num_ranks, barriers=each)
        require(plan, spec, num_ranks=num_ranks, source="the plan of a side")
        work = partial(_peak_bytes, spec, weights, plan)
        of_ranks = run_ranks(work, num_ranks, timeout_s=_TIMEOUT_S, mesh=plan.mesh)
        found.append(tuple(of_ranks))
    return Memory(schedule, *found)


def _spec(model: str, layers: int) -> ModelSpec:
    spec = hub.read_model_spec(model)
    return replace(spec, num_layers=layers)


def _plan(spec: ModelSpec, schedule: str, *, num_ranks: int = NUM_RANKS, barriers: int) -> Plan:
    """A plan with equal stages; no barriers: words on edge stages."""
    traits: Any = SCHEDULES.load(schedule)
    num_stages = num_ranks * traits.min_stages_per_rank
    cuts = tuple(stage * spec.num_layers // num_stages for stage in range(1, num_stages))
    options = {
        "schedule": schedule,
        "num_microbatches": NUM_MICROBATCHES,
        "stages_per_rank": traits.min_stages_per_rank,
        "stage_cuts": list(cuts),
        "vocabulary": "spread" if barriers else "edges",
        "vocabulary_barriers": barriers or 1,
    }
    tokens = LENGTH * NUM_SEQUENCES * NUM_MICROBATCHES
    return Plan(
        mesh=MeshConfig(pp=num_ranks),
        pipeline=PipelineConfig.from_dict(options),
        train=TrainConfig(sequence_length=LENGTH, tokens_per_step=tokens),
        optimizer=OptimizerConfig(lr=1e-4),
    )


def _rates(
    spec: ModelSpec, weights: SharedWeights, plans: Sequence[Plan], pairs: int, rank: int
) -> _Rates:
    """One rank's part of both sides."""
    keep_freed_memory()
    batches = random_batches(spec, (NUM_MICROBATCHES, NUM_SEQUENCES, LENGTH), seed=0)
    spread, edges = (
        our_step(spec, weights, plan, World(plan.mesh, rank, torch.device("cpu")), batches)
        for plan in plans
    )
    losses = [(spread(), edges()) for _ in range(_COMPARED_STEPS)]
    tokens = plans[0].train.tokens_per_step  # and of the other
    rates = interleave(timed(spread, tokens), timed(edges, tokens), pairs)
    torch.distributed.barrier()
    return _Rates(*rates, losses, measure_peak_flops(torch.device("cpu"), torch.float32))


def _peak_bytes(spec: ModelSpec, weights: SharedWeights, plan: Plan, rank: int) -> int:
    """The most that one rank holds in its second step: from then on all state is there."""
    batches = random_batches(spec, (NUM_MICROBATCHES, NUM_SEQUENCES, LENGTH), seed=0)
    world = World(plan.mesh, rank, torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        step = our_step(spec, weights, plan, world, batches)
        step()
        with record_function(_MEASURED):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return _largest_in_step(json.loads(path.read_text())["traceEvents"])


def _largest_in_step(events: Sequence[dict[str, Any]]) -> int:
    """The most bytes that were allocated at a time while the measured step ran."""
    measured = next(event for event in events if event.get("name") == _MEASURED)
    end = measured["ts"] + measured["dur"]
    held = largest = 0
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    for at, size_bytes in changes:
        held += size_bytes
        if measured["ts"] <= at <= end:
            largest = max(largest, held)
    return math.floor(largest)
