"""What benchmarks over ranks have in common: weights, batches, a step of ours, and its rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor

from paceline.bench.layouts import Step
from paceline.data.batch import Batch
from paceline.dist.world import World
from paceline.models.weights import RandomWeights, Weights, build
from paceline.optim import OPTIMIZERS
from paceline.parallel.apply import apply
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import train_step


class SharedWeights:
    """Random weights that ranks share with the process that has forked them.

    Args:
        spec: of the model.
    """

    def __init__(self, spec: ModelSpec) -> None:
        random = RandomWeights(spec)
        self.values = {name: random.read(name) for name, _ in build(spec).named_parameters()}

    def read(self, name: str) -> Tensor:
        return self.values[name]


def random_batches(spec: ModelSpec, shape: tuple[int, int, int], *, seed: int) -> list[Batch]:
    """Micro-batches of random tokens, every one of which has a label.

    Args:
        spec: of the model that they are for.
        shape: micro-batches, sequences of each, tokens of a sequence.
        seed: of the tokens.
    """
    count, num_sequences, length = shape
    generator = torch.Generator().manual_seed(seed)
    drawn = (count, num_sequences, length + 1)
    tokens = torch.randint(spec.vocab_size, drawn, generator=generator)
    documents_BT = torch.zeros(num_sequences, length, dtype=torch.long)
    return [
        Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), documents_BT) for rows in tokens
    ]


def our_step(
    spec: ModelSpec, weights: Weights, plan: Plan, world: World, batches: Sequence[Batch]
) -> Step:
    """A training step as a plan says."""
    model = apply(spec, weights, plan, world)
    optimizer = OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer)
    state = State(model, optimizer)

    def step() -> float:
        lr, max_norm = plan.optimizer.lr, plan.optimizer.clip_norm
        result = train_step(state, batches, next_token, world, learning_rate=lr, max_norm=max_norm)
        return result.loss

    return step


def timed(step: Step, num_tokens: int) -> Callable[[], float]:
    """The rate of a step that all ranks begin together, until the last of them has done it."""

    def rate() -> float:
        torch.distributed.barrier()
        start_s = time.perf_counter()
        step()
        torch.distributed.barrier()
        return num_tokens / (time.perf_counter() - start_s)

    return rate
