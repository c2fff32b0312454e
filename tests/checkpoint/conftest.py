"""Small states to save, shared by the tests of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def make_state() -> Callable[..., Any]:
    """A tiny model and its optimizer on one rank of a plan, after a few steps on random tokens."""
    import torch

    from paceline.data.batch import Batch
    from paceline.dist.world import World
    from paceline.models.families.llama import PRESETS
    from paceline.models.weights import RandomWeights
    from paceline.optim import OPTIMIZERS
    from paceline.parallel.apply import apply
    from paceline.train.objective.next_token import next_token
    from paceline.train.state import State
    from paceline.train.step import train_step

    def make(plan: Any, rank: int = 0, *, seed: int = 0, num_steps: int = 2) -> tuple[State, World]:
        world = World(plan.mesh, rank, torch.device("cpu"))
        spec = PRESETS["tiny"]
        model = apply(spec, RandomWeights(spec, seed), plan, world)
        state = State(
            model, OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer)
        )
        for step in range(num_steps):
            tokens_BT = (torch.arange(10).view(2, 5) * (rank + step + seed + 1)) % 200
            batch = Batch(tokens_BT, tokens_BT + 1, torch.zeros_like(tokens_BT))
            train_step(state, [batch], next_token, world, learning_rate=0.01, max_norm=1.0)
        return state, world

    return make
