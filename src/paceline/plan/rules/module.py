"""Rules for `paceline.parallelize` alone, whose module is not ours."""

from __future__ import annotations

from collections.abc import Iterator

from paceline.core.errors import Problem
from paceline.plan.rules.known import Known


def module_axes(known: Known) -> Iterator[Problem]:
    """The axes that any module can be laid along."""
    for axis in ("pp", "cp", "ep"):
        if getattr(known.plan.mesh, axis) > 1:
            rule = "is for models of this package: a module of one's own is not cut that way"
            yield known.problem(f"mesh.{axis}", rule, "use mesh.tp, dp_shard, dp_replicate")
    if known.plan.zero_technique not in ("0", "3"):
        is_own = known.plan.zero_stage == 3
        path, hint = ("zero.sharder", "leave it out") if is_own else ("zero.stage", "use 0 or 3")
        rule = "is for models of this package: parallelize replicates, or shards by torch"
        yield known.problem(path, rule, hint)


def module_loss_is_its_own(known: Known) -> Iterator[Problem]:
    """The balance of experts is of models of this package."""
    if known.plan.expert.balance_loss_weight:
        rule = "is for models of this package: a module of one's own adds its losses itself"
        yield known.problem("expert.balance_loss_weight", rule, "leave it out")


def module_rows_are_whole(known: Known) -> Iterator[Problem]:
    """A module of one's own keeps its residual stream whole."""
    if known.plan.mesh.tp > 1 and known.plan.tensor.sequence_parallel:
        path = "tensor.sequence_parallel"
        rule = "splits the residual stream, which a module of one's own keeps to itself"
        yield known.problem(path, rule, "set it to false")
