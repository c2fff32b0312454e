"""Leaves a rank its part of a parameter."""

from __future__ import annotations

import torch
from torch import nn

from paceline.plan.layout import Place


def cut_parameter(model: nn.Module, name: str, place: Place) -> None:
    """Puts a parameter of the part's shape in place of a whole one, of the same device."""
    whole = model.get_parameter(name)
    if place.box.sizes == place.shape:
        return
    owner, _, leaf = name.rpartition(".")
    part = torch.empty(place.box.sizes, dtype=whole.dtype, device=whole.device)
    part = nn.Parameter(part, requires_grad=whole.requires_grad)
    setattr(model.get_submodule(owner), leaf, part)
