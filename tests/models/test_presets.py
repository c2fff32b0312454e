"""Sizes for ``random:FAMILY:SIZE``: small ones of every family, and published ones."""

from __future__ import annotations

import pytest

from paceline.models.families import FAMILIES, family
from paceline.models.hub import read_model_spec, resolve

PUBLISHED = {  # parameters, and those that a token meets
    "llama:135m": (134_515_008, 134_515_008),
    "llama:1b": (1_235_814_400, 1_235_814_400),
    "llama:8b": (8_030_261_248, 8_030_261_248),
    "mistral:7b": (7_241_732_096, 7_241_732_096),
    "qwen2:0.5b": (494_032_768, 494_032_768),
    "qwen3:0.6b": (596_049_920, 596_049_920),
    "gemma3:270m": (268_098_176, 268_098_176),
    "gpt2:124m": (124_439_808, 124_439_808),
    "olmo2:1b": (1_484_916_736, 1_484_916_736),
    "mixtral:8x7b": (46_702_792_704, 12_879_925_248),
    "qwen2-moe:14b-a2.7b": (14_315_784_192, 2_689_000_000),
    "pangu-moe:72b-a16b": (71_988_781_056, 16_498_000_000),
    "qwen3-moe:30b-a3b": (30_532_122_624, 3_353_000_000),
}


def test_every_preset_is_known_to_this_test():
    sizes = {f"{name}:{size}" for name in FAMILIES for size in family(name).PRESETS}
    little = {f"{name}:{size}" for name in FAMILIES for size in ("tiny", "small")}
    assert sizes == PUBLISHED.keys() | little


@pytest.mark.cpu
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    spec = read_model_spec(f"random:{name}")
    parameters, active = PUBLISHED[name]
    assert spec.family == name.split(":")[0]
    assert spec.num_parameters == pytest.approx(parameters, rel=0.001)
    assert spec.num_active_parameters == pytest.approx(active, rel=0.01)
    # And a config.json says the same again.
    module = family(spec.family)
    assert module.spec_from_config(module.config_from_spec(spec)) == spec


@pytest.mark.cpu
@pytest.mark.parametrize("name", FAMILIES)
def test_small_models_hold_their_tokenizer(name):
    for size in ("tiny", "small"):
        source = resolve(f"random:{name}:{size}")
        assert source.spec.family == name
        assert source.spec.vocab_size == source.tokenizer.vocab_size
        assert (source.spec.num_parameters < 1e6) == (size == "tiny")
        assert source.spec.num_parameters < 2e7
