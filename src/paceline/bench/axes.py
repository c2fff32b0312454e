"""A training step on two ranks along each axis, beside torch's own means on the same layout.

The peer is a plain Llama written by hand (`paceline.bench.plain`) under `DistributedDataParallel`,
`fully_shard`, `parallelize_module` and `Schedule1F1B` (`paceline.bench.layouts`): the same weights,
batch, maths, clip, AdamW (fused) and cuts, in float32. Both sides live in the same two processes
of one thread each and take turns, so that they share memory, allocator and connections; the losses
of their first steps must agree. The model has SmolLM2's widths and, unless told, few of its layers,
since each rank holds the state of both sides.

On tp two ranks have 4 and 5 of the 9 query heads, on both sides: see
`paceline.bench.layouts.SplitAttention`.

The limit is the rate of square matrix products of both ranks together over the FLOPs of a token.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed

from paceline.bench import context, ladder, layouts, vocabulary
from paceline.bench.layouts import Step
from paceline.bench.outcome import MIN_PAIRS, Outcome, interleave, outcome
from paceline.bench.plain import require_plain
from paceline.bench.ranks import SharedWeights, our_step, random_batches, timed
from paceline.core.errors import PacelineError, UnknownNameError
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.kernels.device import keep_freed_memory, measure_peak_flops
from paceline.models import hub
from paceline.parallel.apply import cut_of
from paceline.plan.check import require
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import OptimizerConfig, PipelineConfig, Plan, TrainConfig

NUM_RANKS = 2
NUM_SEQUENCES, LENGTH = 2, 128
NUM_LAYERS = 6
_LOSS_ERROR = 1e-4
_COMPARED_STEPS = 2  # the second loss tells of the first gradient
_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Axis:
    """How an axis is measured.

    Attributes:
        peer: what torch has for it.
        num_microbatches: of a step on each data rank.
    """

    peer: str
    num_microbatches: int = 1


AXES = {
    "dp_replicate": Axis("DistributedDataParallel"),
    "dp_shard": Axis("fully_shard"),
    "tp": Axis("parallelize_module, sequence parallel"),
    "pp": Axis("Schedule1F1B", num_microbatches=4),
}


class _Measured(NamedTuple):
    """What one rank has measured: rates of both sides in tokens/s, losses, FLOP/s."""

    ours: list[float]
    peer: list[float]
    losses: list[tuple[float, float]]
    peak_flops: float


def run(
    *,
    against: str = "torch",
    model: str = "random:llama:135m",
    layers: int = NUM_LAYERS,
    pairs: int = MIN_PAIRS,
) -> dict[str, Outcome]:
    """Tokens per second of both sides, axis by axis; then what has no peer in torch, beside our own
    plainer way (`paceline.bench.context`, `paceline.bench.vocabulary`, `paceline.bench.ladder`).

    Args:
        against: the peer of the first four axes; there is one.
        model: whose sizes are taken; weights are random.
        layers: blocks of it that are there.
        pairs: of steps.

    Raises:
        UnknownNameError: another peer.
        UsageError: a model that the plain baseline does not compute.
        PacelineError: the sides do not compute the same.
    """
    if against != "torch":
        raise UnknownNameError("peer", against, ["torch"])
    spec = hub.read_model_spec(model)
    require_plain(spec)
    spec = replace(spec, num_layers=min(layers, spec.num_layers))
    weights = SharedWeights(spec)
    found = {name: _measure(name, model, spec, weights, pairs) for name in AXES}
    found["cp"] = context.measure(pairs, length=context.LENGTH)
    words = vocabulary.run(model=model, layers=layers, pairs=pairs)
    sums = ladder.run(model=model, layers=layers, pairs=pairs)
    return found | _under("vocabulary", words) | _under("ladder", sums)


def _under(name: str, outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    return {f"{name}, {part}": outcome for part, outcome in outcomes.items()}


def _measure(name: str, model: str, spec: ModelSpec, weights: SharedWeights, pairs: int) -> Outcome:
    axis, plan = AXES[name], _plan(name)
    require(plan, spec, num_ranks=NUM_RANKS, source=f"the plan of {name}")
    work = partial(_work, name, spec, weights, plan, pairs)
    found: list[_Measured] = run_ranks(work, NUM_RANKS, timeout_s=_TIMEOUT_S, mesh=plan.mesh)
    _require_same(name, found)
    peak = sum(rank.peak_flops for rank in found)
    tokens = f"{axis.num_microbatches} x {NUM_SEQUENCES} x {LENGTH} tokens a data rank"
    result = outcome(
        f"{name} {NUM_RANKS}, {model} of {spec.num_layers} layers, {tokens}, float32",
        found[0].ours,
        found[0].peer,
        against=f"torch {torch.__version__}, {axis.peer}",
        limit=peak / spec.model_flops_per_token(LENGTH),
        limited_by=f"{peak / 1e9:.0f} GFLOP/s of matrix products over the FLOPs of a token",
    )
    device = f"{platform.machine()} CPU, {NUM_RANKS} gloo ranks of one thread"
    return replace(result, device=device)


def _plan(name: str) -> Plan:
    mesh = MeshConfig.from_dict({name: NUM_RANKS})
    num_microbatches = AXES[name].num_microbatches
    sequences = NUM_SEQUENCES * num_microbatches * mesh.num_data_ranks
    return Plan(
        mesh=mesh,
        pipeline=PipelineConfig(num_microbatches=num_microbatches),
        train=TrainConfig(sequence_length=LENGTH, tokens_per_step=LENGTH * sequences),
        optimizer=OptimizerConfig(lr=1e-4),
    )


def _require_same(name: str, found: Sequence[_Measured]) -> None:
    """Raises PacelineError if losses of both sides differ, each the mean of ranks that know it."""
    for step, of_ranks in enumerate(zip(*(rank.losses for rank in found), strict=True), start=1):
        sides = zip(*of_ranks, strict=True)
        known = ([loss for loss in side if not math.isnan(loss)] for side in sides)
        ours, peer = (sum(losses) / len(losses) for losses in known)
        if not abs(ours - peer) <= _LOSS_ERROR * abs(peer):
            rule = f"the loss of step {step} is {ours}, the peer's {peer}: not the same work"
            raise PacelineError(f"{name}: {rule}")


def _work(
    name: str, spec: ModelSpec, weights: SharedWeights, plan: Plan, pairs: int, rank: int
) -> _Measured:
    """One rank's part of both sides."""
    keep_freed_memory()
    world = World(plan.mesh, rank, torch.device("cpu"))
    count = AXES[name].num_microbatches
    shape = (count, NUM_SEQUENCES, LENGTH)
    batches = random_batches(spec, shape, seed=world.data_index)
    ours = our_step(spec, weights, plan, world, batches)
    peer = _peer(name, plan, spec)(spec, weights.values, batches, world, plan.optimizer)
    losses = [(ours(), peer()) for _ in range(_COMPARED_STEPS)]
    tokens = plan.train.tokens_per_step
    rates = interleave(timed(ours, tokens), timed(peer, tokens), pairs)
    torch.distributed.barrier()
    return _Measured(*rates, losses, measure_peak_flops(world.device, torch.float32))


def _peer(name: str, plan: Plan, spec: ModelSpec) -> Callable[..., Step]:
    peers: Mapping[str, Callable[..., Step]] = {
        "dp_replicate": layouts.replicated,
        "dp_shard": layouts.sharded,
        "tp": layouts.split,
        "pp": partial(layouts.piped, layers=cut_of(plan, spec, 0).layers),
    }
    return peers[name]
