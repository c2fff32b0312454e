"""Experts that no token chooses, on ranks that may get no row: training is exact all the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paceline.models.families import family
from paceline.models.moe import MixtureOfExperts
from paceline.models.weights import RandomWeights, build, fill
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec, MoeSpec
from paceline.plan.plan import ExpertConfig, MemoryConfig, PipelineConfig, Plan, ZeroConfig
from paceline.verify.certify import BOUND, Certificate, certify
from paceline.verify.tiny import fitted, tiny_spec

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

MIXTRAL = family("mixtral").PRESETS["tiny"]
SINGLE = replace(
    MIXTRAL,
    moe=MoeSpec(num_experts=8, experts_per_token=1, d_expert=24, normalize_weights=False),
)
BUSY = (0, 1)
"""Experts that get all tokens; of eight, so that of two ranks one gets none, and of four three."""


class Deserted:
    """Random weights whose routers send every token to one of the first two experts.

    The better of w x and -w x is more than what others score, which is a part of it; no two of
    them the same part, or a tie after an update would be broken by rounding.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._random = RandomWeights(spec, seed=4)

    def read(self, name: str) -> Tensor:
        value = self._random.read(name)
        if name.endswith("router.weight"):
            parts = torch.tensor([1.0, -1.0, *(0.1 * torch.arange(6) - 0.2)])
            return parts[:, None] * value[0]
        return value


def exact(certificate: Certificate) -> None:
    assert certificate.certified, certificate.worst
    assert max(certificate.max_rel_grad_error, certificate.max_rel_param_error) <= BOUND == 1e-12


def test_only_some_experts_are_chosen():
    model = build(SINGLE)
    fill(model, Deserted(SINGLE), torch.device("cpu"))
    chosen: set[int] = set()

    def note(module: MixtureOfExperts, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        probs_RE = module.probabilities(inputs[0].flatten(0, 1))
        chosen.update(module.choose(probs_RE)[1].flatten().tolist())

    for block in model.blocks:
        block.ffn.register_forward_hook(note)
    model(torch.arange(200).view(4, 50))
    assert chosen == set(BUSY)


@pytest.mark.parametrize(
    ("mesh", "stage"),
    [
        (MeshConfig(dp_shard=2, ep=2), 0),
        (MeshConfig(dp_shard=4, ep=4), 2),
        (MeshConfig(dp_shard=2, tp=2, ep=4), 3),
    ],
    ids=["ep 2", "ep 4", "ep 4 over tp 2"],
)
def test_experts_without_a_token_and_ranks_without_a_row(mesh, stage):
    plan = Plan(
        mesh=mesh,
        zero=ZeroConfig(stage=stage),
        expert=ExpertConfig(balance_loss_weight=0.3),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    exact(certify(plan, SINGLE, Deserted(SINGLE)))


def test_a_stage_without_a_row_in_a_schedule_that_splits_backward_passes():
    plan = Plan(
        mesh=MeshConfig(pp=2, dp_shard=2, ep=2),
        zero=ZeroConfig(stage=1),
        expert=ExpertConfig(balance_loss_weight=0.3),
        pipeline=PipelineConfig(schedule="zero-bubble-v", stages_per_rank=2, num_microbatches=4),
        memory=MemoryConfig(remat="full"),
    )
    spec = fitted(SINGLE, plan)
    exact(certify(plan, spec, Deserted(spec)))


@pytest.mark.parametrize("name", ["qwen2-moe", "pangu-moe"])
@pytest.mark.parametrize("mesh", [MeshConfig(cp=2, ep=2), MeshConfig(cp=2, tp=2, ep=2)], ids=str)
def test_ranks_that_share_sequences_share_out_experts_too(name, mesh):
    """Counts of a sequence's choices are summed over its parts, padding apart."""
    plan = Plan(mesh=mesh, expert=ExpertConfig(balance_loss_weight=0.3))
    exact(certify(plan, fitted(family(name).PRESETS["tiny"], plan)))


def test_experts_in_a_ladder_residual():
    plan = Plan(mesh=MeshConfig(dp_shard=2, ep=2), expert=ExpertConfig(balance_loss_weight=0.3))
    exact(certify(plan, replace(MIXTRAL, ladder_from=1)))


def test_a_plan_that_shares_out_experts_is_certified_on_a_model_that_has_some():
    plan = Plan(mesh=MeshConfig(dp_shard=3, ep=3))
    spec = tiny_spec(plan)
    assert spec.moe is not None
    assert spec.moe.num_experts == 9
    exact(certify(plan))
