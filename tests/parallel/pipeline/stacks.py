"""A small residual stack, cut into stages of unequal depth, and how ranks run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.core.clock import WallClock
from paceline.dist.p2p import PointToPoint
from paceline.dist.world import World
from paceline.kernels.deferred import DeferredGradients
from paceline.models.linear import Linear, RMSNorm
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Action, RankActions, forward_only, ranks_of_stages
from paceline.parallel.pipeline.communicate import add_transfers
from paceline.parallel.pipeline.runtime import PURPOSES, Border, Runtime
from paceline.plan.mesh import MeshConfig

CPU = torch.device("cpu")
B, D = 3, 6


class Layer(nn.Module):
    """A norm, whose gradient is never put off, and products with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(D, 1e-5)
        self.up = Linear(D, 2 * D)
        self.down = Linear(2 * D, D, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        return x_BD + self.down(functional.silu(self.up(self.norm(x_BD))))


def stack(num_stages: int, dtype: torch.dtype, *, num_frozen: int = 0) -> nn.ModuleList:
    """Stages of one, two and three layers in turn, the same every time; the first ones frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        depths = [1 + stage % 3 for stage in range(num_stages)]
        stages = nn.ModuleList(nn.Sequential(*(Layer() for _ in range(d))) for d in depths)
    stages[:num_frozen].requires_grad_(False)
    return stages.to(dtype)


def batch(microbatch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 + microbatch)
    return torch.randn(B, D, generator=generator, dtype=torch.float64).to(dtype)


def loss_of(y_BD: Tensor, microbatch: int) -> Tensor:
    """A sum that weighs micro-batches unequally, as valid tokens do."""
    return (y_BD.square().sum() + y_BD.sum()) * (microbatch + 1) / 7


class Outcome(NamedTuple):
    """What a rank's step did; plain data."""

    gradients: dict[str, Any]
    losses: dict[int, float]
    trace: list[Action]
    finished: list[Action]
    traffic: list[Any]


def losses_of(stages: nn.ModuleList, num_microbatches: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Every micro-batch's loss, one after the other."""
    for microbatch in range(num_microbatches):
        x_BD = batch(microbatch, dtype)
        for stage in stages:
            x_BD = stage(x_BD)
        yield loss_of(x_BD, microbatch)


def oracle(stages: nn.ModuleList, num_microbatches: int, dtype: torch.dtype) -> Outcome:
    """One process, one micro-batch after the other, by plain autograd."""
    losses = {}
    for microbatch, loss in enumerate(losses_of(stages, num_microbatches, dtype)):
        loss.backward()
        losses[microbatch] = loss.item()
    return Outcome(gradients_of(stages), losses, [], [], [])


def gradients_of(stages: nn.ModuleList) -> dict[str, Any]:
    return {n: p.grad.numpy() for n, p in stages.named_parameters() if p.grad is not None}


def actions_of(name: str, p: int, m: int, *, is_evaluation: bool = False) -> RankActions:
    schedule = SCHEDULES.load(name)
    actions = schedule.actions(p, schedule.min_stages_per_rank, m)
    return add_transfers(forward_only(actions) if is_evaluation else actions)


class Rank:
    """One rank of a pipeline over the stack.

    Args:
        rank: of the world, which has the pipeline's ranks alone.
        actions: of all ranks.
        stages: of the whole model; those of other ranks have no gradients here.
        dtype: of activations.
        watch: takes every stage's output, and gives it back.
    """

    def __init__(
        self,
        rank: int,
        actions: RankActions,
        stages: nn.ModuleList,
        dtype: torch.dtype,
        watch: Callable[[int, int, Tensor], Tensor] | None = None,
    ) -> None:
        self.world = World(MeshConfig(pp=len(actions)), rank, CPU)
        self.stages, self.dtype, self.watch = stages, dtype, watch
        self.losses: dict[int, float] = {}
        self.finished: list[Action] = []
        self.deferred = DeferredGradients()
        for module in stages.modules():
            if isinstance(module, Linear):
                module.product = self.deferred.linear
        self.runtime = Runtime(
            actions[rank],
            ranks_of_stages(actions),
            forward=self._forward,
            border=lambda _stage: Border((B, D), dtype),
            peers=PointToPoint(self.world, "pp", PURPOSES),
            deferred=self.deferred,
            finished=self.finished.append,
            clock=WallClock(),
        )

    def _forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor:
        y_BD = batch(microbatch, self.dtype) if x is None else x
        for layer in self.stages[stage]:
            y_BD = layer(y_BD)
        if self.watch is not None:
            y_BD = self.watch(stage, microbatch, y_BD)
        if stage < len(self.stages) - 1:
            return y_BD
        loss = loss_of(y_BD, microbatch)
        self.losses[microbatch] = loss.item()
        return loss

    def run(self) -> Outcome:
        self.runtime.run()
        trace = [span.action for span in self.runtime.trace]
        traffic = list(self.world.traffic.transfers)
        return Outcome(gradients_of(self.stages), self.losses, trace, self.finished, traffic)
