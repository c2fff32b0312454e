"""The ladder's residual against its formulas, written out sublayer by sublayer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from paceline.core.errors import ConfigError, UsageError
from paceline.decode.cache import ContiguousCache
from paceline.models.attention import attend_within
from paceline.models.families import family, spec_from_config
from paceline.models.families.gpt2 import PRESETS as GPT2
from paceline.models.families.llama import PRESETS
from paceline.models.families.mixtral import PRESETS as MIXTRAL
from paceline.models.families.olmo2 import PRESETS as OLMO2
from paceline.models.fuse import fuse
from paceline.models.ladder_config import as_ladder
from paceline.models.layout import Layout
from paceline.models.weights import RandomWeights, build, fill

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")
TINY = replace(PRESETS["tiny"], num_layers=4, initializer_std=0.15)
TOKENS_BT = torch.randint(0, 259, (2, 24), generator=torch.Generator().manual_seed(0))


def make_model(spec, dtype=torch.float64):
    model = build(spec, dtype)
    fill(model, RandomWeights(spec, seed=4), CPU)
    return model


def sublayers_of(model, layer, layout):
    """h of the formulas: attention and feed-forward of a layer, each behind its norm."""
    block = model.blocks[layer]
    angles = model._angles(layout, torch.float64)[False]

    def attention(x_BTD):
        return block.attention(block.attention_norm(x_BTD), layout, angles, attend_within)

    return [attention, lambda x_BTD: block.ffn(block.ffn_norm(x_BTD))]


def written_out(model, tokens_BT):
    """x_0 = x + h_0(x); x_1 = x_0 + h_1(x); x_i = x_(i-1) + h_i(x_(i-2))."""
    spec, layout = model.spec, Layout.whole_rows(tokens_BT)
    x_BTD = functional.embedding(tokens_BT, model.embedding.weight)
    if spec.positions == "learned":
        x_BTD = x_BTD + model.position_embedding.weight[: tokens_BT.shape[1]]
    for layer in range(spec.ladder_from):
        for h in sublayers_of(model, layer, layout):
            x_BTD = x_BTD + h(x_BTD)
    ladder = [
        h
        for layer in range(spec.ladder_from, spec.num_layers)
        for h in sublayers_of(model, layer, layout)
    ]
    states = [x_BTD]
    for index, h in enumerate(ladder):
        seen = states[max(0, index - 1)]
        states.append(states[index] + h(seen))
    return model.norm(states[-1]) @ model.embedding.weight.T


@pytest.mark.parametrize("preset", [PRESETS, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("first_layer", [0, 2, 3], ids=["whole", "upper half", "last layer"])
def test_the_model_is_its_formulas(preset, first_layer):
    """Logits and every gradient, to 1e-12 of the largest: the same products in the same order."""
    spec = replace(preset["tiny"], num_layers=4, initializer_std=0.15, ladder_from=first_layer)
    model = make_model(spec)
    parameters = list(model.parameters())
    found_BTV, expected_BTV = model(TOKENS_BT), written_out(model, TOKENS_BT)
    assert (found_BTV - expected_BTV).abs().max() <= 1e-12 * expected_BTV.abs().max()
    weights_BTV = torch.randn(found_BTV.shape, generator=torch.Generator().manual_seed(1)).double()
    pairs = zip(
        torch.autograd.grad((found_BTV * weights_BTV).sum(), parameters),
        torch.autograd.grad((expected_BTV * weights_BTV).sum(), parameters),
        strict=True,
    )
    assert all((one - other).abs().max() <= 1e-12 * other.abs().max() for one, other in pairs)


def test_it_is_another_model_than_the_plain_one():
    plain = make_model(TINY)(TOKENS_BT)
    for first_layer in (0, 3):
        assert (
            make_model(replace(TINY, ladder_from=first_layer))(TOKENS_BT) - plain
        ).abs().max() > 1


def test_names_and_shapes_are_the_plain_model_s():
    for preset in (PRESETS, GPT2, MIXTRAL):
        plain = build(preset["tiny"])
        ladder = build(replace(preset["tiny"], ladder_from=1))
        shapes = {name: p.shape for name, p in plain.named_parameters()}
        assert {name: p.shape for name, p in ladder.named_parameters()} == shapes


@torch.inference_mode()
def cached(model, tokens_T, lengths):
    cache = ContiguousCache(model.spec, torch.float32, CPU)
    logits = []
    for part_T in tokens_T.split(lengths):
        positions_T = torch.arange(cache.num_tokens, cache.num_tokens + len(part_T))
        logits.append(model(part_T[None], Layout(positions_T[None]), attend=cache.attend)[0])
        cache.commit(len(part_T))
    return torch.cat(logits)


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("lengths", [1, 7, 24])
@pytest.mark.parametrize("preset", [PRESETS, MIXTRAL], ids=["llama", "mixtral"])
def test_cached_and_chunked_passes_give_what_whole_ones_give(preset, lengths, is_fused):
    """To 1e-5 on float32 logits of size 1, as plain models do."""
    spec = replace(preset["tiny"], initializer_std=0.15, ladder_from=1)
    model = make_model(spec, torch.float32)
    with torch.inference_mode():
        expected_TV = model(TOKENS_BT[:1])[0]
    if is_fused:
        fuse(model)
    assert (cached(model, TOKENS_BT[0], lengths) - expected_TV).abs().max() <= 1e-5


# The config


def config_of(spec):
    return family(spec.family).config_from_spec(replace(spec, ladder_from=None))


@pytest.mark.parametrize("preset", [PRESETS, GPT2, MIXTRAL], ids=["llama", "gpt2", "mixtral"])
def test_a_config_says_from_which_layer_on(preset):
    plain = preset["tiny"]
    expected = replace(spec_from_config(config_of(plain), source="x"), ladder_from=2)
    assert spec_from_config(as_ladder(config_of(plain), 2), source="x") == expected


@pytest.mark.parametrize("first_layer", [-1, 4, None, "2", True])
def test_a_layer_that_is_not_there_is_refused(first_layer):
    with pytest.raises(ConfigError, match="ladder_from"):
        spec_from_config(as_ladder(config_of(TINY), first_layer), source="x")


def test_norms_behind_sublayers_are_refused():
    with pytest.raises(ConfigError, match="a norm behind a sublayer needs its output at once"):
        spec_from_config(as_ladder(config_of(OLMO2["tiny"]), 1), source="x")


@pytest.mark.parametrize("key", ["plain", "plain_type", "ladder_from"])
def test_a_config_that_lacks_a_part_is_refused(key):
    config = as_ladder(config_of(TINY), 1)
    del config[key]
    with pytest.raises(UsageError, match=f"lacks the key '{key}'"):
        spec_from_config(config, source="x")
    with pytest.raises(UsageError, match="a value is not what its key needs"):
        spec_from_config({**config, "plain": 3, "ladder_from": 1}, source="x")
