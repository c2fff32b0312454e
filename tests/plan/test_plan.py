from __future__ import annotations

import tomllib
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.config import Config
from paceline.core.errors import ConfigError
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig, ZeroConfig

CONTRACT_EXAMPLE = """
[mesh]
pp = 2
dp_shard = 2
[zero]
stage = 1
[pipeline]
schedule = "one-f-one-b"
num_microbatches = 8
[train]
sequence_length = 512
tokens_per_step = 65536
"""


def values(hint: Any) -> st.SearchStrategy[Any]:
    """All values of a field's type, but for nan, which equals nothing."""
    if isinstance(hint, type) and issubclass(hint, Config):
        hints = get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    if get_origin(hint) in (Union, UnionType):
        return st.one_of(*(values(member) for member in get_args(hint)))
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if hint is float:
        return st.floats(allow_nan=False)
    return st.none() if hint is NoneType else st.from_type(hint)


@settings(deadline=None, max_examples=50)
@given(values(Plan))
def test_every_plan_round_trips(plan):
    assert Plan.from_dict(tomllib.loads(plan.to_toml())) == plan


def test_the_contracts_example_parses():
    plan = Plan.from_dict(tomllib.loads(CONTRACT_EXAMPLE))
    assert plan == Plan(
        mesh=MeshConfig(pp=2, dp_shard=2),
        zero=ZeroConfig(stage=1),
        pipeline=PipelineConfig(schedule="one-f-one-b", num_microbatches=8),
        train=TrainConfig(sequence_length=512, tokens_per_step=65536),
    )


@pytest.mark.parametrize(
    ("stage", "dp_shard", "in_force"),
    [(None, 1, 0), (None, 2, 3), (0, 2, 0), (1, 2, 1), (2, 4, 2), (3, 2, 3), (0, 1, 0)],
)
def test_the_zero_stage_follows_dp_shard_unless_said(stage, dp_shard, in_force):
    plan = Plan(mesh=MeshConfig(dp_shard=dp_shard), zero=ZeroConfig(stage=stage))
    assert plan.zero_stage == in_force


@pytest.mark.parametrize(
    ("sharder", "pp", "technique"),
    [("auto", 1, "3"), ("auto", 2, "3-own"), ("torch", 1, "3"), ("own", 1, "3-own")],
)
def test_the_sharder_of_stage_3_follows_pp_unless_said(sharder, pp, technique):
    mesh = MeshConfig(dp_shard=2, pp=pp)
    assert Plan(mesh=mesh, zero=ZeroConfig(sharder=sharder)).zero_technique == technique
    for stage in (0, 1, 2):
        zero = ZeroConfig(stage=stage, sharder=sharder)
        assert Plan(mesh=mesh, zero=zero).zero_technique == str(stage)


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("mesh.dp_shards=2", "did you mean dp_shard?"),
        ("pipelines.schedule=gpipe", "did you mean pipeline?"),
        ("pipeline.schedule=gpip", "did you mean gpipe?"),
        ("checkpoint.interval_steps=automatic", "did you mean auto?"),
        ("serve.mesh.replica=2", "did you mean replicas?"),
    ],
)
def test_a_near_miss_is_answered_with_the_name(assignment, hint):
    with pytest.raises(ConfigError) as caught:
        Plan().with_overrides([assignment])
    (problem,) = caught.value.problems
    assert assignment.startswith(problem.path)
    assert problem.hint == hint


def test_a_table_may_be_given_as_plain_data():
    outer = Plan(mesh={"dp_shard": 2}, optimizer={"lr": 1.0, "schedule": {"kind": "linear"}})
    assert outer == Plan.from_dict(outer.to_dict())
    assert outer.mesh.dp_shard == 2
    assert outer.optimizer.schedule.kind == "linear"
    with pytest.raises(ConfigError, match=r"1 problem in mesh:\ndp_shards = 2: unknown key"):
        Plan(mesh={"dp_shards": 2})
