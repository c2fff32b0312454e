"""Whole tensors of what ranks hold, for comparisons."""

from __future__ import annotations

import numpy as np
import torch

from paceline.dist.world import World
from paceline.optim.parts import Part


def whole(part: Part, world: World, *, gradient: bool = False) -> np.ndarray:
    """A part's whole tensor, or its gradient; called by every rank."""
    tensor = part.gradient if gradient else part.local
    assert tensor is not None
    mine = (part.place.box.slices, tensor.detach().numpy())
    assembled = torch.full(part.place.shape, float("nan"), dtype=tensor.dtype).numpy()
    for slices, values in world.collect(mine):
        assembled[slices] = values
    return assembled


def whole_weights(parts: dict[str, Part], world: World) -> dict[str, np.ndarray]:
    return {name: whole(part, world) for name, part in parts.items()}
