"""Deliberate defects in how data ranks share state, each of which `certify` catches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutation import (
    PACKED,
    PADDED,
    SPEC,
    Defect,
    Mutant,
    Patch,
    assert_caught,
    certify_with,
    nothing,
    plan_of,
)
from torch import Tensor

from paceline.dist.world import World
from paceline.parallel import buckets
from paceline.parallel.data import optimizer_sharded, parameter_sharded, shard_gradients
from paceline.parallel.data.gradient_sharded import GradientSharded
from paceline.parallel.data.optimizer_sharded import OptimizerSharded
from paceline.parallel.data.parameter_sharded import ParameterSharded
from paceline.parallel.data.ready_gradients import ReadyGradients
from paceline.parallel.data.shard_gradients import ShardGradients
from paceline.plan.layout import padded_share
from paceline.plan.plan import PipelineConfig, Plan, ZeroConfig

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

STAGES = {
    "1": (ZeroConfig(stage=1), OptimizerSharded),
    "2": (ZeroConfig(stage=2), GradientSharded),
    "own 3": (ZeroConfig(sharder="own"), ParameterSharded),
}
SHARDED = {"dp_shard": 2}  # 43 words, and an odd number of rows in the head's matrix
HYBRID = {"dp_replicate": 2, "dp_shard": 2}
PIPELINE = {"pp": 2, "dp_shard": 2}
SPLIT = PipelineConfig(schedule="zero-bubble", num_microbatches=3)

DEFECTS: dict[str, Defect] = {}


def layout(stage: str, degrees: dict[str, int]) -> Plan:
    zero, _ = STAGES[stage]
    return plan_of(zero=zero, pipeline=SPLIT if "pp" in degrees else None, **degrees)


def mutant(*stages: str, mesh: dict[str, int] = SHARDED) -> Callable[[Mutant], Mutant]:
    """Adds a defect to the table, for some stages or for all."""

    def add(mutate: Mutant) -> Mutant:
        for stage in stages or STAGES:
            name = f"{mutate.__name__}, stage {stage}"
            DEFECTS[name] = Defect(layout(stage, mesh), SPEC, PADDED, mutate)
        return mutate

    return add


@pytest.mark.parametrize("mesh", [SHARDED, HYBRID, PIPELINE], ids=["2", "2x2", "pp 2 x 2"])
@pytest.mark.parametrize("stage", STAGES)
def test_without_a_defect_the_same_path_is_certified(monkeypatch, stage, mesh):
    plan = layout(stage, mesh)
    certificate = certify_with(monkeypatch, plan, SPEC, nothing, PACKED, PADDED)
    assert certificate.certified, certificate.worst


# Collectives


@mutant()
def reduce_scatter_dropped(patch: Patch, _rank: int) -> None:
    """Each rank keeps its rows of its own gradient."""

    def own_rows(self: World, tensor: Tensor, axis: str, *, purpose: str) -> Tensor:
        del purpose
        index = self.coordinate(axis)
        return tensor[index : index + 1]

    patch.setattr(World, "reduce_scatter", own_rows)


@mutant()
def reduce_scatter_that_averages(patch: Patch, _rank: int) -> None:
    original = World.reduce_scatter
    patch.setattr(
        World,
        "reduce_scatter",
        lambda self, tensor, axis, *, purpose: original(self, tensor, axis, purpose=purpose) / 2,
    )


@mutant("1", "2")
def gather_after_the_update_dropped(patch: Patch, _rank: int) -> None:
    for stage in (OptimizerSharded, GradientSharded):
        patch.setattr(stage, "finish_update", lambda _self, _model: None)


@mutant("own 3")
def gathered_rows_of_the_first_step_kept(patch: Patch, _rank: int) -> None:
    patch.setattr(ParameterSharded, "_free", lambda _self, _units: None)


@mutant("own 3")
def gathered_rows_in_the_order_of_another_rank(patch: Patch, _rank: int) -> None:
    original = World.gather
    patch.setattr(
        World,
        "gather",
        lambda self, tensor, axis, *, purpose: original(self, tensor, axis, purpose=purpose).flip(
            0
        ),
    )


@mutant(mesh=HYBRID)
def replicas_never_reduced(patch: Patch, _rank: int) -> None:
    original = World.sum

    def only_others(self: World, tensor: Tensor, axes: Any, *, purpose: str) -> Tensor:
        skips = tuple(axes) == ("dp_replicate",)
        return tensor if skips else original(self, tensor, axes, purpose=purpose)

    patch.setattr(World, "sum", only_others)


@mutant(mesh=HYBRID)
def last_bucket_of_replicas_not_reduced(patch: Patch, _rank: int) -> None:
    original = buckets.buckets
    patch.setattr(buckets, "BUCKET_BYTES", 4096)
    patch.setattr(shard_gradients, "buckets", lambda given: list(original(given))[:-1])


@mutant()
def gradients_reduced_in_float32(patch: Patch, _rank: int) -> None:
    for _, stage in STAGES.values():
        patch.setattr(stage, "reduce_dtype", torch.float32)


# Buckets and units


@mutant("1")
def last_bucket_not_reduced(patch: Patch, _rank: int) -> None:
    original = buckets.buckets
    patch.setattr(buckets, "BUCKET_BYTES", 4096)
    patch.setattr(optimizer_sharded, "buckets", lambda given: list(original(given))[:-1])


@mutant("2", "own 3")
def bucket_left_unflushed(patch: Patch, _rank: int) -> None:
    original = ReadyGradients._flush

    def flush(self: ReadyGradients) -> None:
        if len(self._bucket) > 1:
            original(self)
        self._bucket, self._size_bytes = {}, 0

    patch.setattr(buckets, "BUCKET_BYTES", 1024)
    patch.setattr(ReadyGradients, "_flush", flush)


@mutant("2", "own 3")
def tied_gradient_reduced_before_the_embedding_has_added_to_it(patch: Patch, _rank: int) -> None:
    original = ReadyGradients.__init__

    def init(self: ReadyGradients, *arguments: Any) -> None:
        original(self, *arguments)
        self._shared = frozenset()
        for unit in self._trained:
            if unit.name == "first":
                self._trained[unit] = []

    patch.setattr(buckets, "BUCKET_BYTES", 1)
    patch.setattr(ReadyGradients, "__init__", init)


@mutant("2", "own 3", mesh=PIPELINE)
def deferred_gradients_never_reduced(patch: Patch, _rank: int) -> None:
    def forget(_self: ReadyGradients, parameter: Any) -> None:
        parameter.grad = None

    patch.setattr(ReadyGradients, "defer", forget)


@mutant("2", "own 3", mesh=PIPELINE)
def pass_left_unfinished(patch: Patch, _rank: int) -> None:
    """What the last backward pass of a step leaves is overwritten by nothing, and never summed."""
    for stage in (GradientSharded, ParameterSharded):
        patch.setattr(stage, "finish_pass", lambda _self, _model: None)
        patch.setattr(stage, "finish_gradients", lambda self, _model: self._gradients.finish())


# Accumulation


@mutant("1")
def whole_gradients_kept_from_step_to_step(patch: Patch, _rank: int) -> None:
    original = ShardGradients.reduce

    def keep(self: ShardGradients, parameters: Any) -> None:
        kept = [parameter.grad for parameter in parameters]
        original(self, parameters)
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient

    patch.setattr(ShardGradients, "reduce", keep)


@mutant("2", "own 3")
def whole_gradients_kept_from_micro_batch_to_micro_batch(patch: Patch, _rank: int) -> None:
    whole_gradients_kept_from_step_to_step(patch, _rank)


@mutant("2", "own 3")
def gradients_of_parts_kept_from_step_to_step(patch: Patch, _rank: int) -> None:
    patch.setattr(torch.optim.Optimizer, "zero_grad", lambda _self: None)


@mutant("2", "own 3")
def last_micro_batch_overwrites_the_part(patch: Patch, _rank: int) -> None:
    original = ShardGradients.reduce

    def overwrite(self: ShardGradients, parameters: Any) -> None:
        for parameter in parameters:
            self._parts[parameter].grad = None
        original(self, parameters)

    patch.setattr(ShardGradients, "reduce", overwrite)


# Parts


@mutant()
def parts_off_by_a_row(patch: Patch, _rank: int) -> None:
    """A rank moves other rows than its gradients are of; no row is left out."""

    def shifted(size: int, num_parts: int, index: int) -> range:
        span = padded_share(size, num_parts, index)
        return range(span.start - index, span.stop - index)

    patch.setattr(optimizer_sharded, "padded_share", shifted)
    patch.setattr(parameter_sharded, "padded_share", shifted)


@mutant()
def norm_of_one_rank_s_part(patch: Patch, _rank: int) -> None:
    for _, stage in STAGES.values():
        patch.setattr(stage, "spread_axes", ())


@pytest.mark.parametrize("name", DEFECTS)
def test_the_certificate_fails(monkeypatch, name):
    assert_caught(monkeypatch, DEFECTS[name])
