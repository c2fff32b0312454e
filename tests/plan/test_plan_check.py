from __future__ import annotations

import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from paceline.core.config import Config
from paceline.core.errors import ConfigError, Problem
from paceline.models.peft import PEFT
from paceline.plan.check import check, require
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.plan.rules.basic import NAMED, NOT_BUILT, NOT_NEGATIVE, POSITIVE
from paceline.plan.rules.known import Known, value_at
from paceline.plan.rules.sharding import sharder_fits
from paceline.plan.rules.training import PEFT_KEYS

REFUSED = "is not built in this version"
SPEC = ModelSpec(
    family="llama",
    vocab_size=64,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    d_ffn=32,
    max_positions=512,
)


def plan_with(*settings: tuple[str, Any]) -> Plan:
    data: dict[str, Any] = {}
    for path, value in settings:
        *tables, key = path.split(".")
        table = data
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    return Plan.from_dict(data)


def hint_at(path: str) -> Any:
    owner, _, key = path.rpartition(".")
    return get_type_hints(type(value_at(Plan(), owner)))[key]


def literals(hint: Any) -> Iterator[Any]:
    for member in get_args(hint):
        yield from [member] if get_origin(hint) is Literal else literals(member)


def leaves(config: Config, prefix: str = "") -> Iterator[str]:
    for field in fields(config):
        value = getattr(config, field.name)
        path = prefix + field.name
        yield from leaves(value, f"{path}.") if isinstance(value, Config) else [path]


def unbuilt_plans(path: str) -> list[Plan]:
    """Plans that parse and differ from what is built in the value at `path` alone."""
    plans = []
    for value in [*literals(hint_at(path)), False, True, 2, "other", [3], ["disk", "other"]]:
        try:
            plan = plan_with((path, value))
        except ConfigError:
            continue  # of another type
        if value_at(plan, path) not in NOT_BUILT[path]:
            plans.append(plan)
    return plans


def summary(plan: Plan, **known: Any) -> list[tuple[str, str]]:
    return [(problem.path, problem.rule) for problem in check(plan, **known)]


def test_the_default_plan_is_sound():
    assert check(Plan()) == []
    assert check(Plan(), SPEC, num_ranks=1) == []
    require(Plan(), SPEC, num_ranks=1)


@pytest.mark.parametrize("path", NOT_BUILT)
def test_what_is_not_built_is_refused_by_its_path(path):
    plans = unbuilt_plans(path)
    assert plans, "the entry refuses nothing: drop it"
    for plan in plans:
        (problem,) = check(plan)
        assert (problem.path, problem.rule) == (path, REFUSED)
        assert problem.hint


@pytest.mark.parametrize("path", NOT_BUILT)
def test_what_is_built_is_not_refused(path):
    assert value_at(Plan(), path) in NOT_BUILT[path]
    for value in NOT_BUILT[path]:
        plan = plan_with((path, list(value) if isinstance(value, tuple) else value))
        assert (path, REFUSED) not in summary(plan)


def test_the_hint_of_what_is_not_built_says_what_is():
    hint = check(plan_with(("precision.params", "bfloat16")))[0].hint
    assert hint == 'use "float32", "float64"'
    assert check(plan_with(("pipeline.stage_cuts", [1])))[0].hint.startswith("leave it out")


@pytest.mark.parametrize("levels", [[], ["disk", "disk"], ["memory", ""]])
def test_levels_are_named_once_each(levels):
    (problem,) = check(plan_with(("checkpoint.levels", levels)))
    assert (problem.path, problem.hint) == ("checkpoint.levels", 'use ["memory", "disk"]')
    assert check(plan_with(("checkpoint.levels", ["memory", "disk", "/mnt/far"]))) == []


@pytest.mark.parametrize("path", POSITIVE)
def test_zero_is_refused_where_a_quantity_must_be_positive(path):
    for value in (0, -1):
        assert (path, "must be positive and finite") in summary(plan_with((path, value)))


@pytest.mark.parametrize("path", NOT_NEGATIVE)
def test_zero_is_accepted_where_a_quantity_must_not_be_negative(path):
    assert summary(plan_with((path, 0))) == []
    assert summary(plan_with((path, -1))) == [(path, "must be finite and not negative")]


@pytest.mark.parametrize("path", ["pipeline.num_microbatches", "checkpoint.interval_steps"])
def test_counts_that_may_be_absent_must_be_positive(path):
    assert summary(plan_with((path, 1))) == []
    for value in (0, -1):
        assert summary(plan_with((path, value))) == [(path, "must be positive")]


@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_no_number_may_be_negative_or_nan_or_infinite(value):
    num_plans, accepted = 0, []
    for path in leaves(Plan()):
        for candidate in (value, [value, 0.5], [0.5, value]):
            try:
                plan = plan_with((path, candidate))
            except ConfigError:
                continue  # of another type
            num_plans += 1
            if path not in [problem.path for problem in check(plan)]:
                accepted.append((path, candidate))
    assert num_plans > 5
    assert accepted == []


@pytest.mark.parametrize("betas", [[], [0.9], [0.9, 0.9, 0.9], [1.0, 0.9], [0.9, 1.0], [-0.1, 0]])
def test_betas_are_two_numbers_below_one(betas):
    plan = plan_with(("optimizer.betas", betas))
    assert summary(plan) == [("optimizer.betas", "must be two numbers from 0 to below 1")]
    assert check(plan_with(("optimizer.betas", [0, 0]))) == []


@pytest.mark.parametrize("path", NAMED)
def test_names_come_from_their_familys_table(path):
    module, attribute = NAMED[path].split(":")
    table = getattr(importlib.import_module(module), attribute)
    for name in table:
        assert check(plan_with((path, name))) == []
        near = name + "x"
        (problem,) = check(plan_with((path, near)))
        assert (problem.path, problem.rule) == (path, f"is no {table.kind}")
        assert problem.hint.startswith("did you mean ")
        assert name in problem.hint


def test_all_problems_are_told_at_once():
    plan = plan_with(
        ("train.seed", -1),
        ("optimizer.lr", 0),
        ("optimizer.betas", [0.9]),
        ("optimizer.name", "none of ours"),
        ("serve.mesh.ep", 2),
        ("train.tokens_per_step", 1000),
        ("zero.stage", 3),
    )
    assert sorted(problem.path for problem in check(plan)) == [
        "optimizer.betas",
        "optimizer.lr",
        "optimizer.name",
        "serve.mesh.ep",
        "train.seed",
        "train.tokens_per_step",
        "zero.stage",
    ]


def test_a_rule_between_keys_waits_for_the_keys_that_it_reads_and_for_no_others():
    wrong = [("train.tokens_per_step", 1000), ("zero.stage", 3)]
    found = summary(plan_with(*wrong, ("train.sequence_length", 0)))
    shares = ("zero.stage", "shares state over dp_shard ranks, of which there is one")
    assert found == [("train.sequence_length", "must be positive and finite"), shares]
    unread = [Problem("zero.stage", '"all"', "must be an integer")]
    found = check(plan_with(*wrong), unread=unread)
    assert [problem.path for problem in found] == ["zero.stage", "train.tokens_per_step"]
    unread = [Problem("train", "3", "must be a table")]  # all of its keys are wrong
    assert [problem.path for problem in check(plan_with(*wrong), unread=unread)] == [
        "train",
        "zero.stage",
    ]


def test_all_problems_between_keys_are_told_at_once():
    plan = plan_with(
        ("zero.stage", 3),
        ("train.sequence_length", 1024),
        ("train.tokens_per_step", 1000),
        ("precision.params", "float64"),
    )
    with pytest.raises(ConfigError, match=r"5 problems in plan\.toml:") as caught:
        require(plan, SPEC, num_ranks=8, source="plan.toml")
    assert caught.value.problems == tuple(check(plan, SPEC, num_ranks=8))
    assert sorted(problem.path for problem in caught.value.problems) == [
        "mesh",
        "precision.params",
        "train.sequence_length",
        "train.tokens_per_step",
        "zero.stage",
    ]


@pytest.mark.parametrize("num_ranks", [1, 4, 12])
def test_the_ranks_must_be_those_of_the_mesh(num_ranks):
    plan = plan_with(
        ("mesh.dp_replicate", 2), ("mesh.dp_shard", 3), ("train.tokens_per_step", 512 * 6)
    )
    assert check(plan) == check(plan, num_ranks=6) == []
    (problem,) = check(plan, num_ranks=num_ranks)
    assert (problem.path, problem.value) == ("mesh", "6")
    degrees = "pp 1 x dp_replicate 2 x dp_shard 3 x cp 1 x tp 1"
    assert problem.rule == f"{degrees} needs 6 rank(s), but there are {num_ranks}"
    changes = {
        1: "change [mesh]",
        4: "set mesh.dp_shard = 2",
        12: "set mesh.pp = 2 or mesh.dp_replicate = 4 or mesh.dp_shard = 6 or mesh.cp = 2 or "
        "mesh.tp = 2",
    }
    assert problem.hint == f"start 6 rank(s), or {changes[num_ranks]}"


@pytest.mark.parametrize(
    ("tokens", "hint"), [(1500, "use 1024 or 2048"), (512, "use 1024"), (1025, "use 1024 or 2048")]
)
def test_a_step_must_be_whole_sequences_on_every_data_rank(tokens, hint):
    settings = [("mesh.dp_replicate", 2), ("train.sequence_length", 512)]
    (problem,) = check(plan_with(*settings, ("train.tokens_per_step", tokens)))
    assert problem.path == "train.tokens_per_step"
    assert problem.value == str(tokens)
    assert problem.rule == "must be a multiple of sequence_length x data ranks = 1024"
    assert problem.hint == hint
    assert check(plan_with(*settings, ("train.tokens_per_step", 1024))) == []


def test_microbatches_must_divide_the_sequences_of_a_rank():
    settings = [("mesh.dp_shard", 2), ("train.tokens_per_step", 12 * 512)]
    for count in (1, 2, 3, 6):
        assert check(plan_with(*settings, ("pipeline.num_microbatches", count))) == []
    for count in (4, 5, 12):
        (problem,) = check(plan_with(*settings, ("pipeline.num_microbatches", count)))
        assert (problem.path, problem.value) == ("pipeline.num_microbatches", str(count))
        assert problem.rule == "must divide the 6 sequences of a rank's step"
        assert problem.hint == {4: "use 3 or 6", 5: "use 3 or 6", 12: "use 6"}[count]


def test_microbatches_of_a_step_that_is_not_whole_must_divide_one_that_is_near():
    """Between 5 and 6 sequences a rank."""
    settings = [("mesh.dp_shard", 2), ("train.tokens_per_step", 11 * 512)]
    for count in (1, 2, 3, 5, 6):
        found = check(plan_with(*settings, ("pipeline.num_microbatches", count)))
        assert [problem.path for problem in found] == ["train.tokens_per_step"]
    found = check(plan_with(*settings, ("pipeline.num_microbatches", 4)))
    assert [problem.path for problem in found][1:] == ["pipeline.num_microbatches"]
    assert found[1].rule == "must divide the 5 or 6 sequences of a rank's step"
    assert found[1].hint == "use 3 or 5"


def test_sharing_state_needs_ranks_to_share_it():
    (problem,) = check(plan_with(("zero.stage", 3)))
    assert problem.path == "zero.stage"
    assert problem.hint
    assert check(plan_with(("zero.stage", 0))) == []
    assert check(plan_with(("zero.stage", 3), ("mesh.dp_shard", 2))) == []
    assert check(plan_with(("zero.stage", 0), ("mesh.dp_shard", 2))) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_that_shares_needs_ranks(stage):
    (problem,) = check(plan_with(("zero.stage", stage)))
    assert (problem.path, problem.value) == ("zero.stage", str(stage))
    assert check(plan_with(("zero.stage", stage), ("mesh.dp_shard", 2))) == []


@pytest.mark.parametrize("sharder", ["torch", "own"])
def test_a_sharder_is_for_stage_3_alone(sharder):
    shared = [("mesh.dp_shard", 2), ("zero.sharder", sharder)]
    assert check(plan_with(*shared)) == check(plan_with(*shared, ("zero.stage", 3))) == []
    for stage in (0, 1, 2):
        (problem,) = check(plan_with(*shared, ("zero.stage", stage)))
        assert problem.path == "zero.sharder"
        assert problem.rule == f"is for stage 3, and the stage in force is {stage}"


def test_torch_s_sharder_does_not_go_with_a_pipeline():
    known = Known(
        plan_with(("mesh.pp", 2), ("mesh.dp_shard", 2), ("zero.sharder", "torch")), None, None
    )
    (problem,) = sharder_fits(known)
    assert (problem.path, problem.hint) == ("zero.sharder", 'use "own"')


@pytest.mark.parametrize("key", ["params", "compute", "reduce"])
@pytest.mark.parametrize("other", ["float32", "float64"])
def test_float64_is_for_all_or_none(key, other):
    precision = dict.fromkeys(["params", "compute", "reduce"], other)
    settings = [(f"precision.{name}", value) for name, value in precision.items()]
    assert check(plan_with(*settings)) == []
    mixed = "float32" if other == "float64" else "float64"
    problems = summary(plan_with(*settings, (f"precision.{key}", mixed)))
    rule = "float64 is for params, compute and reduce alike"
    named = next(name for name in precision if (mixed if name == key else other) == "float64")
    assert problems == [(f"precision.{named}", rule)]


def test_a_sequence_must_fit_the_models_context():
    assert check(plan_with(("train.sequence_length", 512)), SPEC) == []
    longer = plan_with(("train.sequence_length", 1024))
    assert check(longer) == []
    rule = "exceeds the model's context of 512 tokens"
    assert summary(longer, spec=SPEC) == [("train.sequence_length", rule)]


def test_checking_a_plan_needs_no_torch():
    script = (
        "import sys; from paceline.plan import batch, check, plan;"
        "check.check(plan.Plan()); batch.batch_shape(plan.Plan());"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def problems_of(*settings: tuple[str, Any]) -> list[tuple[str, str]]:
    """Of a plan for a model with a context of 600."""
    spec = replace(SPEC, max_positions=600)
    return [(problem.path, problem.rule) for problem in check(plan_with(*settings), spec)]


@pytest.mark.parametrize("key", PEFT_KEYS)
def test_an_option_of_fine_tuning_is_read_or_refused(key):
    """By every method that is in the table, and by no other."""
    table = {"none"}.union(*PEFT_KEYS.values())
    assert table == set(PEFT)
    value = {"targets": ["*.up"], "alpha": 2.5}.get(key, 3)
    for method in PEFT:
        expected = [] if method in PEFT_KEYS[key] else [f"is not read by peft.method = {method}"]
        found = problems_of(("peft.method", method), (f"peft.{key}", value))
        assert found == [(f"peft.{key}", rule) for rule in expected]


@pytest.mark.parametrize("key", ["rank", "alpha", "virtual_tokens", "width"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_of_fine_tuning_are_positive(key, value):
    assert problems_of((f"peft.{key}", value)) == [(f"peft.{key}", "must be positive and finite")]


def test_an_unknown_method_lists_near_ones():
    (problem,) = check(plan_with(("peft.method", "lor")), SPEC)
    assert (problem.path, problem.rule) == ("peft.method", "is no method of fine-tuning")
    assert problem.hint.startswith("did you mean lora")


@pytest.mark.parametrize("method", [name for name in PEFT if name != "none"])
def test_fine_tuning_freezes_the_model_already(method):
    settings = [("peft.method", method), ("train.freeze", ["embedding.*"])]
    rule = f"does not go with peft.method = {method}, which freezes the whole model"
    assert problems_of(*settings) == [("train.freeze", rule)]
    assert problems_of(settings[1]) == []


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_virtual_tokens_take_their_part_of_the_context(method):
    """590 + 10 = 600."""
    sizes = [("train.sequence_length", 590), ("train.tokens_per_step", 590)]
    virtual = [] if method == "lora" else [("peft.virtual_tokens", 10)]
    assert problems_of(("peft.method", method), *virtual, *sizes) == []
    if virtual:
        more = [("peft.virtual_tokens", 11)]
        rule = "exceeds, behind 11 virtual tokens, the model's context of 600 tokens"
        assert problems_of(("peft.method", method), *more, *sizes) == [
            ("train.sequence_length", rule)
        ]
