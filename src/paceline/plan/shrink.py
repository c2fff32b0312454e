"""A plan for fewer ranks: the same steps, on what is left of a mesh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from paceline.plan.check import check
from paceline.plan.mesh import AXES, MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import ContextConfig, PipelineConfig, Plan, TensorConfig, ZeroConfig
from paceline.plan.rules.known import divisors

_GIVEN_UP_LAST = ("pp", "tp", "ep", "cp", "dp_shard", "dp_replicate")


def shrink(plan: Plan, spec: ModelSpec, num_ranks: int) -> Plan | None:
    """The plan on the largest legal number of ranks that is at most `num_ranks`.

    Data ranks are given up first, then those of contexts, experts, matrices and stages. What the
    plan says of how ranks share something is left out where it no longer makes sense: ranks that
    are one share nothing, and a number of micro-batches may divide steps no longer. A step reads
    the same tokens in the same order.

    Returns:
        The plan, which `check` has found sound; None if there is none.
    """
    smaller = (_laid(plan, mesh) for mesh in _meshes(plan.mesh, num_ranks))
    legal = (each for plans in smaller for each in plans if not check(each, spec))
    return next(legal, None)


def first_fitting(plans: Sequence[Plan], num_ranks: int) -> Plan | None:
    """The first of some plans, all of which are sound, that has ranks enough in `num_ranks`."""
    return next((plan for plan in plans if plan.mesh.num_ranks <= num_ranks), None)


def _meshes(mesh: MeshConfig, num_ranks: int) -> list[MeshConfig]:
    """Meshes with no degree larger than it was, the best first."""
    degrees = product(*(range(1, getattr(mesh, axis) + 1) for axis in AXES))
    found = [
        MeshConfig(**dict(zip(AXES, shape, strict=True)), ep=ep)
        for shape in degrees
        for ep in divisors(mesh.ep)
    ]
    fitting = [smaller for smaller in found if smaller.num_ranks <= num_ranks]
    return sorted(fitting, key=_preference, reverse=True)


def _preference(mesh: MeshConfig) -> tuple[int, ...]:
    return (mesh.num_ranks, *(getattr(mesh, axis) for axis in _GIVEN_UP_LAST))


def _laid(plan: Plan, mesh: MeshConfig) -> Iterator[Plan]:
    """The plan on another mesh: as it is, then without what only the mesh before made sense of."""
    count = plan.pipeline.num_microbatches
    plan = replace(
        plan,
        mesh=mesh,
        zero=plan.zero if mesh.dp_shard > 1 else ZeroConfig(),
        tensor=plan.tensor if mesh.tp > 1 else TensorConfig(),
        context=plan.context if mesh.cp > 1 else ContextConfig(),
        pipeline=plan.pipeline if mesh.pp > 1 else PipelineConfig(num_microbatches=count),
    )
    yield plan
    context = replace(plan.context, ulysses_degree=None)
    for cuts in (plan.pipeline.stage_cuts, None):
        for number in (count, None):
            pipeline = replace(plan.pipeline, stage_cuts=cuts, num_microbatches=number)
            yield replace(plan, pipeline=pipeline, context=context)
