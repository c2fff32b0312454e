"""A fused model computes what it computed before."""

from __future__ import annotations

import pytest
import torch

from paceline.models.families import FAMILIES
from paceline.models.fuse import fuse
from paceline.models.hub import resolve
from paceline.models.weights import build, fill

pytestmark = pytest.mark.cpu

BOUND = 1e-12  # float64: a larger product may sum in another order


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_is_unfused(name):
    source = resolve(f"random:{name}:tiny")
    model = build(source.spec, torch.float64)
    fill(model, source.weights, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.mul_(3.0)  # so that logits are far from zero
    tokens_BT = torch.arange(40).view(2, 20)
    expected = model(tokens_BT)
    num_parameters = sum(p.numel() for p in model.parameters())
    fuse(model)
    found = model(tokens_BT)
    assert float((found - expected).abs().max() / expected.abs().max()) <= BOUND
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    names = {name.split(".", 2)[2] for name, _ in model.named_parameters() if "blocks" in name}
    assert "attention.qkv.weight" in names
    assert names.isdisjoint({"attention.query.weight", "ffn.gate.weight"})
