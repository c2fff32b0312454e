"""Ladder residuals certified over tensor and data ranks, recomputation and fine-tuning."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mutation import UNEVEN, plan_of

from paceline.models.families.llama import PRESETS
from paceline.models.families.mixtral import PRESETS as MIXTRAL
from paceline.models.weights import RandomWeights
from paceline.plan.check import check
from paceline.plan.plan import PeftConfig, ZeroConfig
from paceline.verify.certify import certify

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

TINY = PRESETS["tiny"]
LEARNED = replace(UNEVEN, positions="learned", norm="layer", qk_norm="none")
FIRST_LAYERS = [0, 1]


def assert_certified(plan, spec):
    assert check(plan, spec) == []
    certificate = certify(plan, spec, RandomWeights(spec, seed=2))
    assert certificate.certified, certificate.worst


def over(*, length=17, sequences=12, **options):
    return plan_of(length=length, sequences=sequences, sequence_parallel=False, **options)


@pytest.mark.parametrize("first_layer", FIRST_LAYERS, ids=["whole", "upper layers"])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("tp", [2, 3])
def test_tensor_ranks(tp, remat, first_layer):
    assert_certified(over(tp=tp, remat=remat), replace(TINY, ladder_from=first_layer))


@pytest.mark.parametrize(
    "spec",
    [UNEVEN, LEARNED, replace(UNEVEN, qk_norm="all")],
    ids=["biases and norms of heads", "learned positions", "norms of all heads"],
)
def test_what_models_have_beside_matrices(spec):
    assert_certified(over(tp=2), replace(spec, ladder_from=1))


@pytest.mark.parametrize(
    "zero",
    [ZeroConfig(stage=stage) for stage in range(4)] + [ZeroConfig(stage=3, sharder="own")],
    ids=["0", "1", "2", "3", "3, own sharder"],
)
@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_data_ranks_share_state(zero, remat):
    plan = plan_of(dp_shard=2, zero=zero, remat=remat, length=17)
    assert_certified(plan, replace(TINY, ladder_from=1))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize(
    "zero",
    [ZeroConfig(stage=2), ZeroConfig(stage=3), ZeroConfig(stage=3, sharder="own")],
    ids=["2", "3", "3, own sharder"],
)
def test_tensor_and_data_ranks(zero, remat):
    assert_certified(over(tp=2, dp_shard=2, zero=zero, remat=remat), replace(TINY, ladder_from=1))


def test_experts_on_data_ranks():
    plan = plan_of(dp_shard=2, zero=ZeroConfig(stage=3), length=17)
    assert_certified(plan, replace(MIXTRAL["tiny"], ladder_from=1))


@pytest.mark.parametrize("method", ["lora", "prefix", "bottleneck"])
def test_fine_tuning(method):
    plan = replace(plan_of(length=17), peft=PeftConfig(method=method))
    assert_certified(plan, replace(TINY, ladder_from=1))
