"""The next tokens of a cached sequence, with and without virtual tokens: 1e-5 in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from paceline.decode.cache import ContiguousCache
from paceline.decode.step import extend, num_own_tokens
from paceline.models.decoder import Decoder
from paceline.models.families import family
from paceline.models.peft import PEFT
from paceline.models.peft.attach import attach
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.plan import PeftConfig

pytestmark = pytest.mark.cpu

BOUND = 1e-5
VIRTUAL = ("prompt", "prefix")
LENGTH = 40
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 259, (1, LENGTH), generator=torch.Generator().manual_seed(5))


def adapted_model(name: str, method: str) -> Decoder:
    """A tiny model with logits of size 1, and an adapter away from its start."""
    spec = replace(family(name).PRESETS["tiny"], initializer_std=0.15)
    model = build(spec)
    config = PeftConfig(method=method, virtual_tokens=7 if method in VIRTUAL else 16)
    attached = attach(model, config, RandomWeights(spec))
    fill(model, attached.weights, CPU)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(attached.added):
            parameter = model.get_parameter(name)
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
@pytest.mark.parametrize("method", PEFT)
@pytest.mark.parametrize("cuts", [(40,), (1,) * 40, (13, 1, 1, 25)], ids=["1", "40", "4"])
def test_cached_is_uncached(name, method, cuts):
    model = adapted_model(name, method)
    cache = ContiguousCache(model.spec, torch.float32, CPU)
    num_own, parts = 0, []
    for part in TOKENS.split(cuts, dim=1):
        parts.append(extend(model, part, cache, last_only=False))
        num_own += part.shape[1]
        assert num_own_tokens(model, cache) == num_own
        assert cache.num_tokens == num_own + model.num_virtual_tokens
    expected = model(TOKENS)
    assert float((torch.cat(parts, dim=1) - expected).abs().max()) <= BOUND
    assert model.num_virtual_tokens == (7 if method in VIRTUAL else 0)


@torch.inference_mode()
def test_the_last_token_alone():
    model = adapted_model("llama", "prefix")
    cache = ContiguousCache(model.spec, torch.float32, CPU)
    assert num_own_tokens(model, cache) == 0
    logits_11V = extend(model, TOKENS[:, :9], cache)
    assert logits_11V.shape == (1, 1, 259)
    difference = (logits_11V - model(TOKENS[:, :9])[:, -1:]).abs().max()
    assert float(difference) <= BOUND
