"""Tensor parallelism certified for every family, with sizes that are no multiple of tp."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.families import FAMILIES, family
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import MemoryConfig, Plan, TensorConfig, TrainConfig, ZeroConfig
from paceline.verify.certify import certify
from paceline.verify.matrix import name_of

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

# Six query heads in groups of two: 4 ranks have 1, 2, 1 and 2 of them, and copies of a key head.
SPEC = replace(PRESETS["tiny"], num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8)


def plan_of(*, is_sequence_parallel: bool = True, stage: int | None = None, remat="none", **mesh):
    return Plan(
        mesh=MeshConfig(**mesh),
        zero=ZeroConfig(stage=stage),
        tensor=TensorConfig(sequence_parallel=is_sequence_parallel),
        memory=MemoryConfig(remat=remat),
        train=TrainConfig(sequence_length=17, tokens_per_step=17 * 24),
    )


@pytest.mark.parametrize("is_sequence_parallel", [True, False])
@pytest.mark.parametrize("tp", [2, 4, *(pytest.param(tp, marks=pytest.mark.slow) for tp in (3, 6))])
def test_any_number_of_ranks_shares_heads_columns_and_words(tp, is_sequence_parallel):
    plan = plan_of(tp=tp, is_sequence_parallel=is_sequence_parallel)
    certificate = certify(plan, SPEC, RandomWeights(SPEC, seed=2))
    assert certificate.certified, certificate.worst


@pytest.mark.parametrize("is_sequence_parallel", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_split(name, is_sequence_parallel):
    spec = family(name).PRESETS["tiny"]
    plan = plan_of(tp=2, is_sequence_parallel=is_sequence_parallel)
    if name == "gpt2":  # whose gradient of them is rounding alone: see `paceline.verify.fuzz`
        plan = replace(plan, train=replace(plan.train, freeze=("*.attention.key.bias",)))
    certificate = certify(plan, spec, RandomWeights(spec, seed=2))
    assert certificate.certified, certificate.worst


QUICK = [
    plan_of(tp=2, dp_shard=2),
    plan_of(tp=2, remat="selective", is_sequence_parallel=False),
    plan_of(tp=2, remat="full"),
]
LONG = [
    plan_of(tp=2, dp_shard=3, is_sequence_parallel=False),
    plan_of(tp=2, dp_shard=2, stage=0),
    plan_of(tp=3, dp_replicate=2),
    plan_of(tp=2, dp_replicate=2, dp_shard=2),
    plan_of(tp=2, dp_shard=2, remat="full"),
]


@pytest.mark.parametrize(
    "plan", [*QUICK, *(pytest.param(plan, marks=pytest.mark.slow) for plan in LONG)], ids=name_of
)
def test_split_matrices_go_with_other_axes(plan):
    certificate = certify(plan, SPEC, RandomWeights(SPEC, seed=2))
    assert certificate.certified, certificate.worst
