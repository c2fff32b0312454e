"""Rules of expert parallelism and of the balance loss, each with its way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.core.errors import ConfigError
from paceline.models.families.llama import PRESETS
from paceline.plan.check import check, require_for_module
from paceline.plan.model_spec import ModelSpec, MoeSpec
from paceline.plan.plan import Plan

DENSE = PRESETS["small"]
PLAIN = replace(DENSE, moe=MoeSpec(num_experts=12, experts_per_token=4, d_expert=8))
GROUPED = replace(
    DENSE, moe=MoeSpec(num_experts=12, experts_per_token=4, d_expert=8, num_groups=2, d_shared=3)
)


def plan_with(*settings: str) -> Plan:
    """With a step that 6 and 12 data ranks share."""
    return Plan().with_overrides(["train.tokens_per_step=12288", *settings])


def only_problem(spec: ModelSpec | None, *settings: str) -> tuple[str, str, str]:
    (problem,) = check(plan_with(*settings), spec)
    return problem.path, problem.rule, problem.hint


@pytest.mark.parametrize("spec", [PLAIN, None], ids=["model", "no model"])
def test_what_is_legal(spec):
    for settings in (
        ("mesh.dp_shard=4", "mesh.ep=4"),
        ("mesh.dp_shard=4", "mesh.ep=2"),
        ("mesh.tp=2", "mesh.ep=2"),
        ("mesh.dp_shard=3", "mesh.tp=2", "mesh.ep=6", "expert.balance_loss_weight=0.01"),
        ("mesh.pp=2", "mesh.dp_replicate=2", "mesh.dp_shard=2", "mesh.ep=2"),
    ):
        assert check(plan_with(*settings), spec) == []


def test_experts_re_group_the_ranks_that_hold_one_state():
    path, rule, hint = only_problem(None, "mesh.dp_shard=6", "mesh.dp_replicate=2", "mesh.ep=4")
    assert (path, hint) == ("mesh.ep", "use 3 or 6")
    assert rule == "must divide dp_shard x cp x tp = 6, which it re-groups"
    assert only_problem(None, "mesh.pp=2", "mesh.ep=2")[2] == "use 1"


def test_ranks_hold_as_many_experts_or_groups_of_them():
    found = only_problem(PLAIN, "mesh.dp_shard=8", "mesh.ep=8")
    assert found[0] == "mesh.ep"
    assert found[1] == "must divide the model's 12 experts, so that ranks have the same load"
    assert found[2] == "use 4"  # of 1, 2 and 4, which divide the 8 ranks too
    found = only_problem(GROUPED, "mesh.dp_shard=4", "mesh.ep=4")
    assert (
        found[1] == "must divide the model's 2 groups of experts, so that ranks have the same load"
    )
    assert found[2] == "use 2"
    assert check(plan_with("mesh.dp_shard=4", "mesh.ep=2"), GROUPED) == []


def test_a_model_without_experts_shares_none_out_and_balances_none():
    path, rule, hint = only_problem(DENSE, "mesh.dp_shard=2", "mesh.ep=2")
    assert (path, hint) == ("mesh.ep", "use 1")
    assert rule == "shares out experts, of which a model of llama has none"
    path, _, hint = only_problem(DENSE, "expert.balance_loss_weight=0.1")
    assert (path, hint) == ("expert.balance_loss_weight", "leave it out")


def test_tensor_ranks_need_tokens_of_their_own():
    whole = ("mesh.tp=2", "tensor.sequence_parallel=false")
    assert check(plan_with(*whole), PLAIN) == []
    path, _, hint = only_problem(PLAIN, *whole, "mesh.ep=2")
    assert (path, hint) == ("tensor.sequence_parallel", "leave it out, or set mesh.ep = 1")


def test_tensor_ranks_share_what_all_tokens_do():
    assert only_problem(GROUPED, "mesh.tp=4")[1:] == (
        "exceeds the model's 3 columns of what all tokens share",
        "use at most 3",
    )


def test_what_has_not_been_proved_with_experts_on_other_ranks():
    shared_out = ("mesh.dp_shard=2", "mesh.ep=2")
    assert only_problem(PLAIN, *shared_out, 'train.compile="on"')[0] == "train.compile"
    assert only_problem(PLAIN, *shared_out, 'peft.method="lora"')[0] == "peft.method"
    path, _, hint = only_problem(PLAIN, "expert.balance_loss_weight=0.1", 'peft.method="lora"')
    assert path == "expert.balance_loss_weight"
    assert hint == 'leave it out, or set peft.method = "none"'


def test_values_of_single_keys():
    assert only_problem(None, "expert.balance_loss_weight=-1")[0] == "expert.balance_loss_weight"
    path, rule, hint = only_problem(None, 'expert.dispatch="all-to-some"')
    assert (path, rule) == ("expert.dispatch", "is no expert dispatch")
    assert "all-to-all" in hint


@pytest.mark.parametrize("setting", ["mesh.ep=2", "expert.balance_loss_weight=0.1"])
def test_modules_of_one_s_own_have_neither(setting):
    plan = plan_with("mesh.dp_shard=2", setting)
    with pytest.raises(ConfigError, match="a module of one's own"):
        require_for_module(plan)
