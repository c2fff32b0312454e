from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.models.families.llama import PRESETS
from paceline.parallel.pipeline.partition import (
    even_cuts,
    layer_flops,
    stage_layers,
    word_costs,
)
from paceline.plan.model_spec import MoeSpec


def sums(costs: list[int], cuts: tuple[int, ...]) -> list[int]:
    return [sum(costs[a:b]) for a, b in itertools.pairwise((0, *cuts, len(costs)))]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.data())
def test_no_other_cuts_have_a_smaller_largest_part(costs, data):
    num_parts = data.draw(st.integers(1, len(costs)))
    found = sums(costs, even_cuts(costs, num_parts))
    others = itertools.combinations(range(1, len(costs)), num_parts - 1)
    best = min((max(s), sum(x * x for x in s)) for s in (sums(costs, cuts) for cuts in others))
    assert (max(found), sum(x * x for x in found)) == best
    assert len(found) == num_parts
    assert all(found)


def test_more_parts_than_items_are_an_error():
    with pytest.raises(AssertionError, match="2 items do not make 3 parts"):
        even_cuts([1, 1], 3)


def test_equal_layers_without_a_head_are_cut_evenly():
    assert even_cuts([1.0] * 10, 4) == (2, 4, 7)
    assert even_cuts([1.0] * 8, 4) == (2, 4, 6)


def test_the_head_makes_the_last_stage_shorter():
    """Llama 3.1 8B: a head of 128256 x 4096 is worth more than two layers."""
    layers = stage_layers(PRESETS["8b"], 4, 4096)
    assert [len(own) for own in layers] == [8, 9, 9, 6]
    assert [index for own in layers for index in own] == list(range(32))


def test_cuts_of_the_plan_are_taken():
    assert stage_layers(PRESETS["8b"], 3, 4096, (1, 30)) == (range(1), range(1, 30), range(30, 32))
    assert stage_layers(PRESETS["8b"], 1, 4096) == (range(32),)


def test_windows_and_experts_count():
    spec = replace(PRESETS["tiny"], num_layers=4, window=2, global_layers=(3,))
    *windowed, whole = layer_flops(spec, 1000)
    assert len(set(windowed)) == 1
    # Keys that a query sees on average, at 4 FLOPs for each value of the query heads.
    keys = (1000 + 1) / 2 - (2 * 3 / 2 + 998 * 2) / 1000
    assert whole - windowed[0] == pytest.approx(4 * spec.d_query * keys + spec.head_flops_per_token)
    moe = MoeSpec(num_experts=8, experts_per_token=2, d_expert=spec.d_ffn, dense_layers=(0,))
    dense, *sparse = layer_flops(replace(spec, window=None, moe=moe), 8)[:-1]
    extra = 2 * (spec.d_model * 8 + 3 * spec.d_model * spec.d_ffn)  # router, a second expert
    assert [flops - dense for flops in sparse] == [extra] * 2


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("length", [1, 100, 4096])
def test_layers_and_head_are_the_whole_model(name, length):
    spec = PRESETS[name]
    assert sum(layer_flops(spec, length)) == pytest.approx(spec.forward_flops_per_token(length))


def test_a_head_that_is_spread_weighs_on_no_stage():
    spec = PRESETS["8b"]
    assert len(set(layer_flops(spec, 4096, has_head=False))) == 1
    layers = stage_layers(spec, 4, 4096, has_head=False)
    assert [len(of_stage) for of_stage in layers] == [8, 8, 8, 8]


def test_words_cost_their_share_of_the_head():
    spec = PRESETS["8b"]
    costs = word_costs(spec, 4096, num_stages=4, num_ranks=4)
    stage_flops = sum(layer_flops(spec, 4096, has_head=False)) / 4
    assert costs.score * stage_flops * 4 == pytest.approx(spec.head_flops_per_token)
    assert costs.forward == 1.0
