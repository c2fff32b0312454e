"""Rules derived from a traced model are those that are written by hand for our decoder."""

from __future__ import annotations

import pytest
import torch
from tensor_models import OTHERS, OURS, build
from torch import nn

from paceline.models.families import family, spec_from_config
from paceline.models.trace import leaves_of, trace
from paceline.plan.derive_rules import derive
from paceline.plan.module_rules import Rules
from paceline.plan.tensor_rules import Split, decoder_rules

pytestmark = pytest.mark.cpu

TOKENS_BT = torch.tensor([[7, 3, 5, 11, 2, 60, 1], [4, 8, 9, 10, 12, 13, 6]])


def derived(module: nn.Module, tp: int, **overrides: str) -> Rules:
    def call():
        return module(input_ids=TOKENS_BT, use_cache=False)

    return derive(trace(module, call, TOKENS_BT).graph, tp, overrides)


def by_hand(module: nn.Module, tp: int) -> dict[str, tuple[int, list[set[int]]]]:
    """Hand-written splits in the names that `transformers` goes by: its dimension, and the places
    that each rank has. Several of our parameters may be one of its.
    """
    spec = spec_from_config(module.config.to_dict(), source="test")
    stored = family(spec.family).weight_map(spec)
    found: dict[str, tuple[int, list[set[int]]]] = {}
    for ours, split in decoder_rules(spec, tp).items():
        if split.dim is None:
            continue
        (name,) = stored[ours].names
        is_flipped = stored[ours].is_transposed and "bias" not in ours
        dim = 1 - split.dim if is_flipped else split.dim
        offset = stored[ours].rows[0] if stored[ours].rows else 0
        places = [{index + offset for index in split.indices(rank)} for rank in range(tp)]
        there = found.get(name)
        if there:
            assert there[0] == dim
            places = [a | b for a, b in zip(there[1], places, strict=True)]
        found[name] = (dim, places)
    return found


def places_of(split: Split, tp: int) -> list[set[int]]:
    return [set(split.indices(rank)) for rank in range(tp)]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", OURS)
def test_derived_rules_are_those_written_by_hand(name, tp):
    module = build(OURS[name])
    rules = derived(module, tp)
    expected = by_hand(module, tp)
    if name == "olmo2" and tp == 4:
        # Ranks share key heads. The norm over all of them reads the gathered keys, of which then
        # no rank needs another's copy; by hand they are copied.
        keys = [key for key in expected if "k_proj" in key]
        expected |= {key: (0, [set(range(4 * n, 4 * n + 4)) for n in range(4)]) for key in keys}
    tied = {"lm_head.weight"} if module.config.tie_word_embeddings else set()
    found = {key: (s.dim, places_of(s, tp)) for key, s in rules.splits.items() if key not in tied}
    assert found == expected
    assert all(key not in rules.splits or key in tied for key in tied | rules.whole.keys())


def test_the_roles_of_a_layer():
    roles = derived(build(OURS["qwen3"]), 2).roles
    layer = "model.layers.0."
    found = {key.removeprefix(layer): role for key, role in roles.items() if key.startswith(layer)}
    assert found == {
        "self_attn.q_proj": "column",
        "self_attn.k_proj": "column",
        "self_attn.v_proj": "column",
        "self_attn.q_norm": "inside",
        "self_attn.k_norm": "inside",
        "self_attn.o_proj": "row",
        "mlp.gate_proj": "column",
        "mlp.up_proj": "column",
        "mlp.down_proj": "row",
    }
    assert roles["model.embed_tokens"] == "vocabulary"
    assert roles["lm_head"] == "gathered"
    norms = derived(build(OURS["olmo2"]), 2).roles
    assert norms[f"{layer}self_attn.q_norm"] == "taken"
    assert norms[f"{layer}self_attn.q_proj"] == "gathered"


def test_what_is_left_whole_says_why():
    latent = derived(build(OTHERS["deepseek-v3"]), 2)
    assert "model.layers.0.self_attn.o_proj" in latent.whole
    assert latent.roles["model.layers.0.mlp.down_proj"] == "row"
    sinks = derived(build(OTHERS["gpt-oss"]), 2)
    assert "self_attn.sinks too" in sinks.whole["model.layers.0.self_attn.o_proj"]
    positions = derived(build(OURS["gpt2"]), 2)
    assert positions.whole.keys() == {"transformer.wpe"}


def test_all_parameters_of_fused_projections_are_somebodys():
    for name in ("phi3", "falcon", "falcon, one key head", "gpt-neox", "persimmon"):
        module = build(OTHERS[name])
        rules = derived(module, 2)
        for key, split in rules.splits.items():
            size = module.get_parameter(key).shape[split.dim]
            assert set().union(*places_of(split, 2)) == set(range(size)), (name, key)


def test_dropout_is_found_where_it_would_happen():
    assert trace(*sample(build(OURS["gpt2"]))).has_dropout
    assert not trace(*sample(build(OURS["llama"]))).has_dropout


def sample(module: nn.Module):
    return module, lambda: module(input_ids=TOKENS_BT, use_cache=False), TOKENS_BT


def test_a_trace_leaves_a_module_as_it_was():
    module = build(OURS["gpt2"])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    trace(*sample(module))
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert all(not leaf._forward_hooks for _, leaf in leaves_of(module))
    assert all(p.grad is None for p in module.parameters())
