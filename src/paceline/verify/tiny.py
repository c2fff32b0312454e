"""Tiny models, made so that a plan can be laid over them."""

from __future__ import annotations

from dataclasses import replace

from paceline.models.families import llama, mixtral
from paceline.plan.model_spec import ModelSpec, MoeSpec
from paceline.plan.plan import Plan


def tiny_spec(plan: Plan) -> ModelSpec:
    """A model that admits a plan: odd sizes, key heads in groups, one layer more than stages.

    It has experts where the plan shares them out or balances them.
    """
    has_experts = plan.mesh.ep > 1 or plan.expert.balance_loss_weight > 0
    family = mixtral if has_experts else llama
    return fitted(family.PRESETS["tiny"], plan, spare_layers=1)


def fitted(spec: ModelSpec, plan: Plan, *, spare_layers: int = 0) -> ModelSpec:
    """A model with layers for every stage, and heads and experts for every rank of a plan.

    Args:
        spec: kept but for its numbers of layers, heads and experts.
        plan: how it will be laid out.
        spare_layers: more than there are stages, where there are several.
    """
    num_stages = plan.mesh.pp * plan.pipeline.stages_per_rank
    cuts = plan.pipeline.stage_cuts or (0,)
    least = num_stages + spare_layers if num_stages > 1 else 1
    group = spec.num_heads // spec.num_kv_heads
    least_heads = plan.mesh.tp * (plan.ulysses_degree if plan.mesh.cp > 1 else 1)
    num_kv_heads = max(spec.num_kv_heads, -(-least_heads // group))
    return replace(
        spec,
        num_layers=max(spec.num_layers, least, cuts[-1] + 1),
        num_kv_heads=num_kv_heads,
        num_heads=group * num_kv_heads,
        moe=None if spec.moe is None else _fitted_experts(spec.moe, plan.mesh.ep),
    )


def _fitted_experts(moe: MoeSpec, ep: int) -> MoeSpec:
    """Experts, or groups of them, that a number of ranks shares out evenly."""
    if moe.num_groups == 1:
        return replace(moe, num_experts=-(-moe.num_experts // ep) * ep)
    num_groups = -(-moe.num_groups // ep) * ep
    return replace(
        moe,
        num_groups=num_groups,
        num_experts=moe.num_experts // moe.num_groups * num_groups,
        experts_per_token=moe.experts_per_token // moe.num_groups * num_groups,
    )
