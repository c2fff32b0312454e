"""Rules of experts that ranks share out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.plan import Plan
from paceline.plan.rules.known import Known, divisors, nearest


def experts_re_group(known: Known) -> Iterator[Problem]:
    """Experts are shared out among the ranks that hold one state."""
    mesh, count = known.plan.mesh, _expert_ranks(known.plan)
    if count % mesh.ep:
        rule = f"must divide dp_shard x cp x tp = {count}, which it re-groups"
        near = nearest(mesh.ep, divisors(count))
        yield known.problem("mesh.ep", rule, f"use {near}")


def experts_fit(known: Known) -> Iterator[Problem]:
    """Every rank holds as many experts, and has as many tokens for them where groups see to it."""
    degree, spec = known.plan.mesh.ep, known.spec
    if degree == 1 or spec is None:
        return
    if spec.moe is None:
        rule = f"shares out experts, of which a model of {spec.family} has none"
        yield known.problem("mesh.ep", rule, "use 1")
        return
    counts = {"experts": spec.moe.num_experts}
    if spec.moe.num_groups > 1:
        counts = {"groups of experts": spec.moe.num_groups, **counts}
    for what, count in counts.items():
        if count % degree:
            rule = f"must divide the model's {count} {what}, so that ranks have the same load"
            near = nearest(degree, divisors(math.gcd(*counts.values(), _expert_ranks(known.plan))))
            yield known.problem("mesh.ep", rule, f"use {near}")
            return


def _expert_ranks(plan: Plan) -> int:
    """Ranks that `mesh.ep` re-groups."""
    return plan.mesh.dp_shard * plan.mesh.cp * plan.mesh.tp


def experts_have_own_tokens(known: Known) -> Iterator[Problem]:
    """Ranks that send rows to experts have different ones."""
    plan = known.plan
    if plan.mesh.ep > 1 and plan.mesh.tp > 1 and not plan.tensor.sequence_parallel:
        rule = "has tensor ranks hold the same tokens, all of which mesh.ep would send to experts"
        hint = "leave it out, or set mesh.ep = 1"
        yield known.problem("tensor.sequence_parallel", rule, hint)


def balance_has_experts(known: Known) -> Iterator[Problem]:
    """What is balanced is the load of experts."""
    path, plan = "expert.balance_loss_weight", known.plan
    if not plan.expert.balance_loss_weight:
        return
    if known.spec is not None and known.spec.moe is None:
        rule = f"balances experts, of which a model of {known.spec.family} has none"
        yield known.problem(path, rule, "leave it out")
    if plan.peft.method != "none":
        rule = f"has not been proved with peft.method = {plan.peft.method}"
        yield known.problem(path, rule, 'leave it out, or set peft.method = "none"')
