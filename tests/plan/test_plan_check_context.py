"""Rules of context parallelism, and the nearest values that are legal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.families.llama import PRESETS
from paceline.plan.check import check, require_for_module, warnings
from paceline.plan.plan import Plan

SPEC = replace(PRESETS["tiny"], num_heads=6, num_kv_heads=3)
EQUAL = replace(SPEC, num_kv_heads=6)


def plan_with(*settings: str) -> Plan:
    return Plan().with_overrides(list(settings))


def only_problem(*settings: str) -> tuple[str, str]:
    (problem,) = check(plan_with(*settings), SPEC)
    return problem.path, problem.hint


@pytest.mark.parametrize("method", ["ring", "zigzag-ring", "ulysses", "ulysses-ring", "token-ring"])
def test_every_method_runs_on_two_ranks(method):
    settings = ["mesh.cp=2", f'context.method="{method}"']
    assert check(plan_with(*settings), SPEC) == []
    for more in ("mesh.tp=2", "mesh.pp=2", "mesh.dp_shard=2", 'memory.remat="full-keep-attention"'):
        assert check(plan_with(*settings, more), replace(SPEC, num_layers=2)) == []


def test_a_method_is_for_several_ranks():
    path, hint = only_problem('context.method="ring"')
    assert (path, hint) == ("context.method", "set mesh.cp = 2 or more, or leave it out")
    assert check(plan_with('context.method="zigzag-ring"')) == []  # the default says nothing
    assert only_problem("context.ulysses_degree=2")[0] == "context.ulysses_degree"
    assert only_problem('memory.remat="full-keep-attention"') == (
        "memory.remat",
        'use "full" or "selective", or set mesh.cp = 2 or more',
    )


def test_ranks_that_exchange_heads_divide_the_axis():
    mixed = ("mesh.cp=6", 'context.method="ulysses-ring"')
    for degree in (1, 2, 3, 6):
        assert check(plan_with(*mixed, f"context.ulysses_degree={degree}"), SPEC) == []
    assert only_problem(*mixed, "context.ulysses_degree=4")[1] == "use 3 or 6"
    other = ("mesh.cp=6", "context.ulysses_degree=2")
    assert only_problem(*other) == ("context.ulysses_degree", "it is for ulysses-ring")


@pytest.mark.parametrize(
    ("cp", "degree"), [(2, 1), (3, 1), (4, 2), (6, 2), (8, 2), (9, 3), (12, 3), (16, 4)]
)
def test_heads_are_exchanged_by_the_root_of_the_ranks_unless_told(cp, degree):
    mixed = plan_with(f"mesh.cp={cp}", 'context.method="ulysses-ring"')
    assert mixed.ulysses_degree == degree


def test_every_rank_that_exchanges_heads_gets_one():
    all_heads = 'context.method="ulysses"'
    assert check(plan_with("mesh.cp=6", all_heads), SPEC) == []
    path, hint = only_problem("mesh.cp=8", all_heads)
    other = 'or context.method = "ulysses-ring" or "zigzag-ring"'
    assert (path, hint) == ("mesh.cp", f"use 6, {other}")
    assert only_problem("mesh.cp=4", "mesh.tp=2", all_heads) == ("mesh.cp", f"use 3, {other}")
    mixed = ("mesh.cp=4", "mesh.tp=2", 'context.method="ulysses-ring"', "context.ulysses_degree=4")
    assert only_problem(*mixed) == ("context.ulysses_degree", "use 2")


def test_what_has_not_been_proved_with_it_is_refused():
    assert only_problem("mesh.cp=2", 'peft.method="lora"')[0] == "peft.method"
    short = ("train.sequence_length=64", "peft.virtual_tokens=8")
    assert only_problem("mesh.cp=2", 'peft.method="prefix"', *short)[0] == "peft.method"
    assert only_problem("mesh.cp=2", 'train.compile="on"')[0] == "train.compile"
    with pytest.raises(Exception, match=r"mesh\.cp"):
        require_for_module(plan_with("mesh.cp=2"))


def test_a_token_ring_that_does_not_pay_is_warned_of():
    tokens = 'context.method="token-ring"'
    (warning,) = warnings(plan_with("mesh.cp=4", tokens), SPEC)
    assert warning.path == "context.method"
    assert "6 query heads on 3 key head(s)" in warning.rule
    assert "ring" in warning.hint
    assert check(plan_with("mesh.cp=4", tokens), SPEC) == []
    assert warnings(plan_with("mesh.cp=4", tokens), EQUAL) == []
    assert warnings(plan_with("mesh.cp=3", tokens), EQUAL) == []
    assert len(warnings(plan_with("mesh.cp=2", tokens), EQUAL)) == 1  # both ways are one link
    assert warnings(plan_with("mesh.cp=4"), SPEC) == []
    assert warnings(plan_with("mesh.cp=4", tokens)) == []  # of no model
    # On 2 tensor ranks heads are in no equal groups, and keys are copied for every query.
    (spread,) = warnings(plan_with("mesh.cp=2", "mesh.tp=2", tokens), SPEC)
    assert "3 query heads on 2 key head(s)" in spread.rule
