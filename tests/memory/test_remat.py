"""Rematerialised runs have the same gradients, keep less, and compute again what they say."""

from __future__ import annotations

import pytest
import torch

from paceline.memory.remat import REMAT
from paceline.models.attention import Attention
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights, build, fill
from paceline.parallel.apply import recompute

pytestmark = pytest.mark.cpu

SPEC = PRESETS["tiny"]
OF_ONE_RANK = [remat for remat in REMAT if remat != "full-keep-attention"]
"""The other needs a core that reaches over ranks: tests/parallel/context."""
TOKENS_BT = (torch.arange(64).view(2, 32) * 7) % SPEC.vocab_size


def run(remat):
    """Gradients, bytes kept for the backward pass, and calls of blocks and of cores."""
    model = build(SPEC)
    fill(model, RandomWeights(SPEC, seed=1), torch.device("cpu"))
    recompute(model, REMAT.load(remat))
    calls = {"blocks": 0, "cores": 0}

    def counted(module, _inputs):
        calls["cores" if isinstance(module, Attention) else "blocks"] += 1

    for block in model.blocks:
        block.register_forward_pre_hook(counted)
    calls_of_cores = 0
    for module in model.modules():
        if isinstance(module, Attention):
            around = module.around_core

            def core(function, *tensors, around=around):
                def counting(*inner):
                    nonlocal calls_of_cores
                    calls_of_cores += 1
                    return function(*inner)

                return around(counting, *tensors)

            module.around_core = core
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(TOKENS_BT).square().sum()
    saved_bytes = sum(kept.values())
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return gradients, saved_bytes, calls["blocks"], calls_of_cores


def test_every_way_gives_the_same_bits():
    plain, *_ = run("none")
    for remat in OF_ONE_RANK:
        found, *_ = run(remat)
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), remat


def test_what_is_computed_again_is_what_the_name_says():
    layers = SPEC.num_layers
    calls = {remat: run(remat)[2:] for remat in OF_ONE_RANK}
    assert calls == {
        "none": (layers, layers),
        "selective": (layers, 2 * layers),
        "full": (2 * layers, 2 * layers),
    }


def test_less_is_kept():
    kept = {remat: run(remat)[1] for remat in OF_ONE_RANK}
    assert kept["full"] < kept["selective"] < kept["none"]
