"""A spread vocabulary against the oracle: a few layouts; the matrix has the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paceline.models.weights import RandomWeights
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.mesh import MeshConfig
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig, ZeroConfig
from paceline.verify.certify import BOUND, certify
from paceline.verify.tiny import tiny_spec

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

LENGTH, SEQUENCES = 9, 6
VOCAB_SIZE = 43  # that no number of ranks divides


def plan_of(schedule: str, barriers: int, pp: int, *, stage: int = 0, dp_shard: int = 1) -> Plan:
    mesh = MeshConfig(pp=pp, dp_shard=dp_shard)
    options = {
        "schedule": schedule,
        "stages_per_rank": SCHEDULES.load(schedule).min_stages_per_rank,
        "num_microbatches": SEQUENCES,
        "vocabulary": "spread",
        "vocabulary_barriers": barriers,
    }
    tokens = LENGTH * SEQUENCES * mesh.num_data_ranks
    return Plan(
        mesh=mesh,
        zero=ZeroConfig.from_dict({"stage": stage}),
        pipeline=PipelineConfig.from_dict(options),
        train=TrainConfig(sequence_length=LENGTH, tokens_per_step=tokens),
    )


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "plan",
    [
        plan_of("one-f-one-b", 1, 2),
        plan_of("one-f-one-b", 2, 3),
        plan_of("v-half", 1, 3),
        plan_of("zero-bubble", 2, 2),
        plan_of("one-f-one-b", 2, 2, stage=3, dp_shard=2),
    ],
    ids=["1f1b-1", "1f1b-2", "v-half-1", "zero-bubble-2", "zero-3-2"],
)
def test_words_spread_over_ranks_train_as_one_process_does(plan, is_tied):
    spec = replace(tiny_spec(plan), vocab_size=VOCAB_SIZE, tied_embeddings=is_tied)
    certificate = certify(plan, spec, RandomWeights(spec, seed=1))
    assert certificate.certified, certificate.worst
    errors = certificate.max_rel_grad_error, certificate.max_rel_param_error, certificate.loss_error
    assert max(errors) <= BOUND == 1e-12
