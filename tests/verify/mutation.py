"""The harness of mutation tests: a deliberate defect inside the ranks, and what `certify` says.

A defect is a patch that is applied inside the forked ranks alone, so the oracle stays right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paceline.dist.world import World
from paceline.models.weights import RandomWeights
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PipelineConfig, Plan, TrainConfig, ZeroConfig
from paceline.verify import certify as certify_module
from paceline.verify.certify import BOUND, CASES, Certificate, certify

SPEC = ModelSpec(
    family="llama",
    vocab_size=43,
    d_model=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    d_ffn=40,
    max_positions=32,
    tied_embeddings=True,
)
PACKED, PADDED = CASES

Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch, int], None]
"""Patches this process, which is the given rank."""


def certify_with(
    monkeypatch: Patch,
    mesh: MeshConfig,
    mutate: Mutant,
    *cases: str,
    zero: ZeroConfig | None = None,
    pipeline: PipelineConfig | None = None,
) -> Certificate:
    """Certifies a layout with a defect in its ranks."""
    monkeypatch.setattr(certify_module, "CASES", {case: CASES[case] for case in cases})
    original = certify_module._compare

    def compare(case: str, plan: Plan, *arguments: Any) -> Any:
        world = next(argument for argument in arguments if isinstance(argument, World))
        mutate(monkeypatch, world.rank)  # in a fork: the parent never sees it
        return original(case, plan, *arguments)

    monkeypatch.setattr(certify_module, "_compare", compare)
    plan = Plan(
        mesh=mesh,
        zero=zero or ZeroConfig(),
        train=TrainConfig(sequence_length=16, tokens_per_step=16 * 12),
        pipeline=pipeline or PipelineConfig(num_microbatches=3),
    )
    return certify(plan, SPEC, RandomWeights(SPEC, seed=2))


def assert_caught(certificate: Certificate) -> None:
    errors = (
        certificate.max_rel_grad_error,
        certificate.max_rel_param_error,
        certificate.loss_error,
    )
    assert not certificate.certified
    assert max(errors) > 10 * BOUND, errors  # a defect, not a matter of rounding
