"""Rules of sequences that ranks share."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.plan import ContextConfig
from paceline.plan.rules.known import Known, divisors, nearest
from paceline.plan.tensor_rules import head_share

_NO_CONTEXT = "says how mesh.cp ranks share sequences, which is 1"


def context_has_ranks(known: Known) -> Iterator[Problem]:
    """A way of sharing sequences is for ranks that share them."""
    path = "context.method"
    if known.plan.mesh.cp == 1 and known.plan.context.method != ContextConfig().method:
        yield known.problem(path, _NO_CONTEXT, "set mesh.cp = 2 or more, or leave it out")


def ulysses_divides(known: Known) -> Iterator[Problem]:
    """Ranks that exchange heads are a whole part of those that share sequences."""
    plan, path = known.plan, "context.ulysses_degree"
    degree, cp = plan.context.ulysses_degree, plan.mesh.cp
    if degree is None:
        return
    if cp == 1:
        yield known.problem(path, _NO_CONTEXT, "leave it out, or set mesh.cp = 2 or more")
        return
    if plan.context.method != "ulysses-ring":
        rule = f"is not read by context.method = {plan.context.method}"
        yield known.problem(path, rule, "it is for ulysses-ring")
    elif cp % degree:
        near = nearest(degree, divisors(cp))
        yield known.problem(path, f"must divide mesh.cp = {cp}", f"use {near}")


def ulysses_has_heads(known: Known) -> Iterator[Problem]:
    """Every rank that exchanges heads gets a query head."""
    plan, spec = known.plan, known.spec
    if spec is None or plan.mesh.cp == 1 or plan.mesh.tp > spec.num_heads:
        return
    num_heads, degree = spec.num_heads // plan.mesh.tp, plan.ulysses_degree
    if degree <= num_heads:
        return
    each = "the model" if plan.mesh.tp == 1 else "a tensor rank"
    is_mixed = plan.context.method == "ulysses-ring"
    path = "context.ulysses_degree" if is_mixed else "mesh.cp"
    legal = [n for n in range(1, num_heads + 1) if not is_mixed or plan.mesh.cp % n == 0]
    rule = f"has {degree} ranks exchange the {num_heads} query head(s) of {each}"
    other = "" if is_mixed else ', or context.method = "ulysses-ring" or "zigzag-ring"'
    yield known.problem(path, rule, f"use {legal[-1]}{other}")


def core_is_kept(known: Known) -> Iterator[Problem]:
    """Cores of attention over ranks alone can give what they have kept."""
    path = "memory.remat"
    if known.plan.memory.remat == "full-keep-attention" and known.plan.mesh.cp == 1:
        rule = "is for attention over mesh.cp ranks, which is 1"
        yield known.problem(path, rule, 'use "full" or "selective", or set mesh.cp = 2 or more')


def token_ring_pays(known: Known) -> Iterator[Problem]:
    """Bytes of the busiest link, by the formulas of `paceline.parallel.context`, per head size."""
    plan, spec, cp = known.plan, known.spec, known.plan.mesh.cp
    if plan.context.method != "token-ring" or spec is None or cp == 1:
        return
    if plan.mesh.tp > spec.num_heads:
        return
    heads = head_share(spec.num_heads, spec.num_kv_heads, plan.mesh.tp, 0)
    narrow = {"float64": 8, "bfloat16": 2}.get(plan.precision.compute, 4)
    wide = max(4, narrow)
    queries = len(heads.query) * spec.head_dim * narrow
    keys = len(heads.key if heads.is_grouped else heads.query) * spec.head_dim
    sums = len(heads.query) * wide
    ours = cp * queries + sums + (cp - 1) * (3 * queries + sums) + queries
    rings = 2 * (cp - 1) * keys * (2 * narrow + wide)
    if ours > rings:
        rule = (
            f"has the busiest link of {cp} ranks carry {ours / rings:.1f} times what ring would: "
            f"{len(heads.query)} query heads on {len(heads.key)} key head(s)"
        )
        yield known.problem("context.method", rule, 'use "zigzag-ring" or "ring"')
