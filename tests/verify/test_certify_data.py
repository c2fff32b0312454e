"""Every ZeRO stage is certified, beside every other axis and choice that it meets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from paceline.models.families import family
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    MemoryConfig,
    PeftConfig,
    PipelineConfig,
    Plan,
    TensorConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.verify.certify import certify

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

STAGES = {
    "1": ZeroConfig(stage=1),
    "2": ZeroConfig(stage=2),
    "3": ZeroConfig(stage=3),
    "own 3": ZeroConfig(sharder="own"),
}
OWN = [name for name in STAGES if name != "3"]
MESHES = {
    "2": MeshConfig(dp_shard=2),
    "3": MeshConfig(dp_shard=3),
    "4": MeshConfig(dp_shard=4),
    "2x2": MeshConfig(dp_replicate=2, dp_shard=2),
    "2x3": MeshConfig(dp_replicate=2, dp_shard=3),
}
PIPELINES = {
    "one-f-one-b": 1,
    "interleaved": 2,
    "zero-bubble": 1,
    "zero-bubble-v": 2,
}
UNTIED = ModelSpec(
    family="llama",
    vocab_size=37,
    d_model=20,
    num_layers=4,
    num_heads=5,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=27,
    max_positions=24,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)


def slow_but(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values of a parameter, of which all but some are for long runs."""
    return [
        value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


def assert_certified(plan: Plan, spec: ModelSpec) -> None:
    plan = replace(plan, train=TrainConfig(sequence_length=16, tokens_per_step=16 * 24))
    certificate = certify(plan, spec, RandomWeights(spec, seed=2))
    assert certificate.certified, certificate.worst


@pytest.mark.parametrize("mesh", slow_but(MESHES, "3"))
@pytest.mark.parametrize("stage", STAGES)
def test_any_number_of_ranks_shares_state(stage, mesh):
    assert_certified(Plan(mesh=MESHES[mesh], zero=STAGES[stage]), PRESETS["tiny"])


@pytest.mark.parametrize("mesh", slow_but(["3", "2x2"], "3"))
@pytest.mark.parametrize("stage", slow_but(STAGES, "1", "own 3"))
def test_low_rank_additions_of_fewer_rows_than_ranks_are_shared(stage, mesh):
    peft = PeftConfig(method="lora", rank=2)
    assert_certified(Plan(mesh=MESHES[mesh], zero=STAGES[stage], peft=peft), UNTIED)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
@pytest.mark.parametrize("stage", slow_but(["2", "own 3"], "own 3"))
def test_virtual_tokens_are_shared(stage, method):
    peft = PeftConfig(method=method, virtual_tokens=3)
    assert_certified(Plan(mesh=MESHES["2"], zero=STAGES[stage], peft=peft), PRESETS["tiny"])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3"])
@pytest.mark.parametrize("stage", slow_but(["2", "own 3"], "own 3"))
def test_families_are_shared(stage, name):
    """Learned positions; stacked experts; scaled embeddings and norms with an offset."""
    assert_certified(Plan(mesh=MESHES["2"], zero=STAGES[stage]), family(name).PRESETS["tiny"])


@pytest.mark.parametrize("remat", slow_but(["selective", "full"], "full"))
@pytest.mark.parametrize("stage", slow_but(["2", "own 3"], "own 3"))
def test_stages_go_with_recomputation(stage, remat):
    plan = Plan(mesh=MESHES["2"], zero=STAGES[stage], memory=MemoryConfig(remat=remat))
    assert_certified(plan, UNTIED)


@pytest.mark.parametrize("is_sequence_parallel", slow_but([True, False], True))
@pytest.mark.parametrize("stage", OWN)
def test_stages_go_with_tensor_ranks(stage, is_sequence_parallel):
    mesh = MeshConfig(dp_shard=2, tp=2)
    tensor = TensorConfig(sequence_parallel=is_sequence_parallel)
    spec = replace(PRESETS["tiny"], num_heads=6, num_kv_heads=3, head_dim=8)
    assert_certified(Plan(mesh=mesh, zero=STAGES[stage], tensor=tensor), spec)


@pytest.mark.parametrize("schedule", slow_but(PIPELINES, "zero-bubble-v"))
@pytest.mark.parametrize("stage", OWN)
@pytest.mark.parametrize("is_tied", slow_but([True, False], True))
def test_stages_go_with_pipelines(stage, schedule, is_tied):
    per_rank = PIPELINES[schedule]
    pipeline = PipelineConfig(schedule=schedule, stages_per_rank=per_rank, num_microbatches=4)
    spec = replace(PRESETS["tiny"], num_layers=4) if is_tied else UNTIED
    mesh = MeshConfig(pp=2, dp_shard=2)
    assert_certified(Plan(mesh=mesh, zero=STAGES[stage], pipeline=pipeline), spec)


@pytest.mark.parametrize("stage", OWN)
def test_a_split_schedule_needs_no_pipeline(stage):
    pipeline = PipelineConfig(schedule="zero-bubble", num_microbatches=4)
    assert_certified(Plan(mesh=MESHES["2"], zero=STAGES[stage], pipeline=pipeline), UNTIED)


@pytest.mark.slow
@pytest.mark.parametrize("stage", OWN)
def test_stages_go_with_all_axes_at_once(stage):
    mesh = MeshConfig(pp=2, dp_replicate=2, dp_shard=2, tp=2)
    pipeline = PipelineConfig(schedule="zero-bubble", num_microbatches=3)
    memory = MemoryConfig(remat="full")
    plan = Plan(mesh=mesh, zero=STAGES[stage], pipeline=pipeline, memory=memory)
    assert_certified(plan, replace(PRESETS["tiny"], num_layers=4))
