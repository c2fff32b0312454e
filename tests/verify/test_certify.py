"""Certified in float64 at 1e-12, for every layout that this version has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.data.loader import Loader
from paceline.models.families.llama import PRESETS
from paceline.models.weights import RandomWeights, build
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    MemoryConfig,
    OptimizerConfig,
    PipelineConfig,
    Plan,
    TrainConfig,
    ZeroConfig,
)
from paceline.verify import certify as certify_module
from paceline.verify.certify import BOUND, CASES, certify

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

LAYOUTS = {
    "one rank": Plan(),
    "dp_shard 2": Plan(mesh=MeshConfig(dp_shard=2)),
    "dp_shard 3": Plan(mesh=MeshConfig(dp_shard=3)),
    "dp_shard 2, stage 0": Plan(mesh=MeshConfig(dp_shard=2), zero=ZeroConfig(stage=0)),
    "dp_replicate 2": Plan(mesh=MeshConfig(dp_replicate=2)),
    "dp_replicate 2 x dp_shard 2": Plan(mesh=MeshConfig(dp_replicate=2, dp_shard=2)),
    "selective": Plan(memory=MemoryConfig(remat="selective")),
    "full": Plan(memory=MemoryConfig(remat="full")),
    "dp_shard 2, full": Plan(mesh=MeshConfig(dp_shard=2), memory=MemoryConfig(remat="full")),
}
UNTIED = ModelSpec(
    family="llama",
    vocab_size=37,
    d_model=20,
    num_layers=2,
    num_heads=5,
    num_kv_heads=1,
    head_dim=4,
    d_ffn=28,
    max_positions=24,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)


def sized(plan: Plan) -> Plan:
    """With batches that 1 to 4 ranks can share."""
    return replace(plan, train=TrainConfig(sequence_length=32, tokens_per_step=32 * 12))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_process_does(layout):
    certificate = certify(sized(LAYOUTS[layout]))
    assert certificate.certified, certificate.worst
    assert BOUND == 1e-12
    assert certificate.max_rel_grad_error <= 1e-12
    assert certificate.max_rel_param_error <= 1e-12
    assert certificate.loss_error <= 1e-12
    names = {name for name, _ in build(PRESETS["tiny"]).named_parameters()}
    assert certificate.per_parameter.keys() == names
    largest = max(entry["gradient"] for entry in certificate.per_parameter.values())
    assert 0 < largest <= certificate.max_rel_grad_error  # sums in another order do round


@pytest.mark.parametrize("layout", ["one rank", "dp_shard 2", "dp_replicate 2"])
def test_untied_heads_and_biases_are_certified_too(layout):
    certificate = certify(sized(LAYOUTS[layout]), UNTIED, RandomWeights(UNTIED, seed=7))
    assert certificate.certified, certificate.worst
    assert "head.weight" in certificate.per_parameter
    assert "blocks.1.ffn.down.bias" in certificate.per_parameter


def test_the_plan_s_own_choices_stay_in_play():
    plan = Plan(
        mesh=MeshConfig(dp_shard=2),
        train=TrainConfig(sequence_length=16, tokens_per_step=128, freeze=("embedding.*",), seed=5),
        pipeline=PipelineConfig(num_microbatches=4),
        optimizer=OptimizerConfig(name="sgd", weight_decay=0.5, betas=(0.5, 0.7)),
    )
    certificate = certify(plan)
    assert certificate.certified, certificate.worst
    assert certificate.per_parameter["embedding.weight"] == {"gradient": 0.0, "weight": 0.0}
    assert certificate.per_parameter["blocks.0.ffn.up.weight"]["gradient"] > 0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_hard_cases_are_in_play(case, seed):
    """Unequal counts, accumulation, a clip that bites, padding and packing, and a frozen layer in
    one case, all trained in another.
    """
    pack, is_frozen = CASES[case].pack, CASES[case].is_frozen
    plan = sized(Plan(mesh=MeshConfig(dp_replicate=2)))
    spec = PRESETS["tiny"]
    plan = certify_module._hard(
        replace(plan, train=replace(plan.train, seed=seed)), spec, CASES[case]
    )
    store = certify_module._documents(plan, spec)
    loader = Loader(store, plan, end_token=0)
    steps = certify_module._oracle_steps(plan, spec, RandomWeights(spec), store)
    for step, expected in enumerate(steps, start=1):
        ranks = [loader.microbatches(step, index) for index in range(2)]
        assert [len(batches) for batches in ranks] == [3, 3]
        first, second = (sum(batch.count for batch in batches) for batches in ranks)
        assert pack or first != second  # packed counts differ as well, but for a chance
        documents = {
            n for batches in ranks for b in batches for n in b.documents_BT.unique().tolist()
        }
        assert (max(documents) > 0 and min(documents) == 0) if pack else documents == {-1, 0}
        assert 0 < expected.clip_factor < 1
        assert ("blocks.0.ffn.up.weight" in expected.gradients) != is_frozen
        assert "embedding.weight" in expected.gradients
