"""Plans for fewer ranks: legal, as large as can be, and with the same steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.models.families.llama import PRESETS
from paceline.plan.check import check
from paceline.plan.difference import changed_keys
from paceline.plan.mesh import AXES
from paceline.plan.model_spec import MoeSpec
from paceline.plan.plan import Plan
from paceline.plan.rules.resume import fixed_keys_stay
from paceline.plan.shrink import first_fitting, shrink

SPEC = replace(
    PRESETS["tiny"],
    num_layers=6,
    max_positions=64,
    moe=MoeSpec(num_experts=12, experts_per_token=4, d_expert=8),
)
SIZES = ("train.sequence_length=16", "train.tokens_per_step=192")  # 12 sequences


def plan_with(*assignments: str) -> Plan:
    return Plan().with_overrides([*SIZES, *assignments])


@pytest.mark.parametrize(
    ("assignments", "num_ranks", "changes"),
    [
        (["mesh.dp_shard=4"], 3, {"mesh.dp_shard": 3}),
        (["mesh.dp_replicate=4"], 2, {"mesh.dp_replicate": 2}),
        # 5 data ranks do not divide 12 sequences,
        (["mesh.dp_shard=6"], 5, {"mesh.dp_shard": 4}),
        # nor do two stages of them make three ranks.
        (["mesh.pp=2", "mesh.dp_shard=2"], 3, {"mesh.dp_shard": 1}),
        (["mesh.tp=2", "mesh.dp_replicate=3"], 5, {"mesh.dp_replicate": 2}),
        (["mesh.tp=2", "mesh.cp=2"], 3, {"mesh.cp": 1}),
        (["mesh.dp_shard=4", "mesh.ep=4"], 3, {"mesh.dp_shard": 3, "mesh.ep": 1}),
        (["mesh.dp_shard=4", "mesh.ep=2"], 2, {"mesh.dp_shard": 2}),
        (["mesh.pp=4"], 3, {"mesh.pp": 3}),
        # What one rank shares with nobody is left out.
        (["mesh.dp_shard=2", "zero.stage=2"], 1, {"mesh.dp_shard": 1, "zero.stage": None}),
        (
            ["mesh.tp=2", "tensor.sequence_parallel=false"],
            1,
            {"mesh.tp": 1, "tensor.sequence_parallel": True},
        ),
        (
            ["mesh.cp=2", "context.method=ulysses"],
            1,
            {"mesh.cp": 1, "context.method": "zigzag-ring"},
        ),
        (
            [
                "mesh.pp=2",
                "pipeline.schedule=interleaved",
                "pipeline.stages_per_rank=2",
                "pipeline.num_microbatches=2",
            ],
            1,
            {"mesh.pp": 1, "pipeline.schedule": "one-f-one-b", "pipeline.stages_per_rank": 1},
        ),
        (
            ["mesh.pp=3", "pipeline.stage_cuts=[2, 3]"],
            2,
            {"mesh.pp": 2, "pipeline.stage_cuts": None},
        ),
        # 3 sequences a rank in one micro-batch each, then 4 in fewer.
        (
            ["mesh.dp_shard=4", "pipeline.num_microbatches=3"],
            3,
            {"mesh.dp_shard": 3, "pipeline.num_microbatches": None},
        ),
    ],
)
def test_the_largest_legal_layout_is_found_and_nothing_else_changes(
    assignments, num_ranks, changes
):
    plan = plan_with(*assignments)
    assert check(plan, SPEC) == []
    smaller = shrink(plan, SPEC, num_ranks)
    assert smaller is not None
    assert changed_keys(plan, smaller) == changes


def test_there_may_be_no_smaller_layout():
    assert shrink(plan_with("mesh.dp_shard=2"), SPEC, 0) is None
    whole = plan_with("mesh.dp_shard=2", "pipeline.num_microbatches=6")
    assert shrink(whole, SPEC, 1) is not None


def test_given_plans_are_tried_in_their_order():
    plans = [plan_with("mesh.dp_shard=3"), plan_with("mesh.tp=2"), plan_with("mesh.dp_shard=2")]
    assert first_fitting(plans, 3) is plans[0]
    assert first_fitting(plans, 2) is plans[1]
    assert first_fitting(plans, 1) is None


@settings(max_examples=40, deadline=None)
@given(
    degrees=st.tuples(*[st.integers(1, 3)] * len(AXES)),
    schedule=st.sampled_from(["one-f-one-b", "gpipe", "zero-bubble"]),
    num_lost=st.integers(1, 3),
)
def test_every_smaller_plan_is_sound_and_reads_the_same_steps(degrees, schedule, num_lost):
    meshes = [f"mesh.{axis}={degree}" for axis, degree in zip(AXES, degrees, strict=True)]
    plan = plan_with(*meshes, f"pipeline.schedule={schedule}", "zero.sharder=auto")
    if check(plan, SPEC) or plan.mesh.num_ranks <= num_lost:
        return
    num_left = plan.mesh.num_ranks - num_lost
    smaller = shrink(plan, SPEC, num_left)
    assert smaller is not None  # one rank at least is legal for all of these
    assert smaller.mesh.num_ranks <= num_left
    assert check(smaller, SPEC) == []
    assert list(fixed_keys_stay(plan, smaller)) == []
