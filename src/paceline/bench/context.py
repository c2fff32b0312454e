"""Attention over a causal row that two ranks share: a zigzag ring beside a contiguous ring.

Forward and backward pass of the core alone, in float32, on two ranks of one thread each. Both sides
live in the same processes, send the same bytes and take turns; what they compute must agree. A
contiguous ring waits for the rank that has the row's end, which has three blocks of work of the
four that there are to the other's one.

The limit is the rate of square matrix products of both ranks together over the FLOPs of the pairs
of a query and a key that it sees: two products forward and four backward. (A fused backward pass
needs a fifth, since it keeps no scores.)
"""

from __future__ import annotations

import platform
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from paceline.bench.layouts import Step
from paceline.bench.outcome import MIN_PAIRS, Outcome, interleave, outcome
from paceline.bench.ranks import timed
from paceline.core.errors import PacelineError
from paceline.data.batch import Batch
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.kernels.device import keep_freed_memory, measure_peak_flops
from paceline.models.attention import AttentionSite
from paceline.models.layout import Layout
from paceline.parallel.context.share import SharedSequences
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import ContextConfig, Plan

NUM_RANKS = 2
LENGTH = 8192
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 3, 1, 64
"""A third of SmolLM2's heads, which are of the same size and in the same groups."""
_PRODUCTS = 2 + 4
_ERROR = 1e-4
_TIMEOUT_S = 600.0


class _Measured(NamedTuple):
    """What one rank has measured: rates of both sides in tokens/s, their sums, FLOP/s."""

    ours: list[float]
    peer: list[float]
    sums: tuple[float, float]
    peak_flops: float


def measure(pairs: int = MIN_PAIRS, *, length: int = LENGTH) -> Outcome:
    """Tokens per second of a zigzag ring and of a contiguous ring.

    Args:
        pairs: of passes.
        length: tokens of the row.

    Raises:
        PacelineError: the sides do not compute the same.
    """
    mesh = MeshConfig(cp=NUM_RANKS)
    work = partial(_work, mesh, pairs, length)
    found: list[_Measured] = run_ranks(work, NUM_RANKS, timeout_s=_TIMEOUT_S, mesh=mesh)
    ours, peer = (sum(of_ranks) for of_ranks in zip(*(rank.sums for rank in found), strict=True))
    if not abs(ours - peer) <= _ERROR * abs(peer):
        raise PacelineError(f"cp: the zigzag gives {ours}, the ring {peer}: not the same work")
    peak = sum(rank.peak_flops for rank in found)
    flops_per_pair = 2 * _PRODUCTS * NUM_HEADS * HEAD_DIM
    result = outcome(
        f"cp {NUM_RANKS}, attention over {length} causal tokens, {NUM_HEADS} query heads on "
        f"{NUM_KV_HEADS} key head, float32",
        found[0].ours,
        found[0].peer,
        against="ring, its contiguous form",
        limit=peak / (flops_per_pair * (length + 1) / 2),
        limited_by=f"{peak / 1e9:.0f} GFLOP/s of matrix products over the FLOPs of a causal token",
    )
    device = f"{platform.machine()} CPU, {NUM_RANKS} gloo ranks of one thread"
    return replace(result, device=device)


def _work(mesh: MeshConfig, pairs: int, length: int, rank: int) -> _Measured:
    """One rank's part of both sides."""
    keep_freed_memory()
    world = World(mesh, rank, torch.device("cpu"))
    zigzag, ring = ContextConfig(method="zigzag-ring"), ContextConfig(method="ring")
    ours, peer = (_step(Plan(mesh=mesh, context=c), world, length) for c in (zigzag, ring))
    sums = ours(), peer()
    rates = interleave(timed(ours, length), timed(peer, length), pairs)
    torch.distributed.barrier()
    return _Measured(*rates, sums, measure_peak_flops(world.device, torch.float32))


def _step(plan: Plan, world: World, length: int) -> Step:
    """Both passes of this rank's places of one row; gives the sum of sizes of what they make."""
    shared = SharedSequences(plan, world)
    row_1T = torch.zeros(1, length, dtype=torch.int64)
    part = shared.share(Batch(row_1T, row_1T, row_1T))
    assert part.places_T is not None
    *inputs, grad_BTNH = (x[:, part.places_T].contiguous() for x in _tensors(length))
    leaves = [x.requires_grad_() for x in inputs]
    site = AttentionSite(layer=0, window=None, scale=HEAD_DIM**-0.5)

    def step() -> float:
        layout = Layout.of_documents(part.documents_BT, part.places_T)
        out_BTNH = shared.attend(*leaves, layout=layout, site=site)
        gradients = torch.autograd.grad(out_BTNH, leaves, grad_BTNH)
        found = out_BTNH.detach(), *gradients
        return sum(float(tensor.abs().sum(dtype=torch.float64)) for tensor in found)

    return step


def _tensors(length: int) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, of the whole row."""
    generator = torch.Generator().manual_seed(0)
    counts = NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS
    return [torch.randn(1, length, count, HEAD_DIM, generator=generator) for count in counts]
