"""The layouts that are certified one by one, by name. Pure data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    MemoryConfig,
    PipelineConfig,
    Plan,
    TensorConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.verify.tiny import tiny_spec

_LENGTH = 17  # no number of ranks divides it
_SEQUENCES = 12  # of each data rank
_TWO_SCHEDULES = ("one-f-one-b", "zero-bubble-v")
_STAGES = (0, 1, 2, 3)
_REMATS = ("none", "selective", "full")


class Entry(NamedTuple):
    """A layout that is certified, and the model that it is certified on."""

    plan: Plan
    spec: ModelSpec


def layouts() -> dict[str, Entry]:
    """Name to plan and model: each axis alone, then axes together, then rematerialisation."""
    plans = [*_tensor(), *_data(), *_pipeline(), *_together(), *_remat()]
    return {name_of(plan): Entry(plan, tiny_spec(plan)) for plan in plans} | _ladder()


def name_of(plan: Plan) -> str:
    """A layout in words, as it differs from the defaults."""
    words = [
        " x ".join(f"{axis} {n}" for axis, n in plan.mesh.to_dict().items() if n > 1) or "one rank"
    ]
    if plan.mesh.pp > 1:
        words.append(plan.pipeline.schedule)
    if plan.mesh.dp_shard > 1:
        is_own = plan.zero.sharder == "own"
        words.append(f"ZeRO {plan.zero_stage}{', own sharder' if is_own else ''}")
    if plan.mesh.tp > 1 and not plan.tensor.sequence_parallel:
        words.append("no sequence parallel")
    if plan.memory.remat != "none":
        words.append(f"remat {plan.memory.remat}")
    return ", ".join(words)


def _plan(
    *,
    stage: int | None = None,
    sharder: Literal["auto", "own"] = "auto",
    schedule: str | None = None,
    remat: str = "none",
    is_sequence_parallel: bool = True,
    **mesh: int,
) -> Plan:
    config = MeshConfig(**mesh)
    traits: Any = SCHEDULES.load(schedule) if schedule else None
    values: dict[str, Any] = {"remat": remat, "stage": stage, "schedule": schedule or "one-f-one-b"}
    return Plan(
        mesh=config,
        zero=ZeroConfig(stage=values["stage"], sharder=sharder),
        tensor=TensorConfig(sequence_parallel=is_sequence_parallel),
        pipeline=PipelineConfig(
            schedule=values["schedule"],
            stages_per_rank=traits.min_stages_per_rank if traits else 1,
            num_microbatches=_SEQUENCES if config.pp > 1 else _SEQUENCES // 2,
        ),
        memory=MemoryConfig(remat=values["remat"]),
        train=TrainConfig(
            sequence_length=_LENGTH, tokens_per_step=_LENGTH * _SEQUENCES * config.num_data_ranks
        ),
    )


def _tensor() -> list[Plan]:
    ways = (True, False)
    return [_plan(tp=tp, is_sequence_parallel=way) for tp in (2, 3, 4, 8) for way in ways]


def _data() -> list[Plan]:
    replicas = [_plan(dp_replicate=2), _plan(dp_replicate=3)]
    shards = [_plan(dp_shard=n, stage=stage) for n in (2, 3, 4) for stage in _STAGES]
    hybrid = [_plan(dp_replicate=2, dp_shard=n, stage=stage) for n in (2, 3) for stage in _STAGES]
    own = [_plan(dp_shard=n, stage=3, sharder="own") for n in (2, 3, 4)]
    own.append(_plan(dp_replicate=2, dp_shard=2, stage=3, sharder="own"))
    return replicas + shards + hybrid + own


def _pipeline() -> list[Plan]:
    return [_plan(pp=pp, schedule=schedule) for pp in (2, 3, 4) for schedule in SCHEDULES]


def _together() -> list[Plan]:
    plans = [_plan(pp=2, tp=2, schedule=schedule) for schedule in SCHEDULES]
    for stage in _STAGES:
        plans += [_plan(pp=2, dp_shard=2, stage=stage, schedule=s) for s in SCHEDULES]
        plans.append(_plan(tp=2, dp_shard=2, stage=stage))
        plans.append(_plan(dp_replicate=2, dp_shard=2, tp=2, stage=stage))
        plans += [_plan(pp=2, tp=2, dp_shard=2, stage=stage, schedule=s) for s in _TWO_SCHEDULES]
    plans += [_plan(pp=2, dp_replicate=2, tp=2, schedule=s) for s in _TWO_SCHEDULES]
    return plans


def _remat() -> list[Plan]:
    plans = [_plan(remat=remat) for remat in _REMATS]
    for remat in _REMATS[1:]:
        plans += [
            _plan(remat=remat, tp=2),
            _plan(remat=remat, dp_shard=2, stage=3),
            _plan(remat=remat, dp_shard=2, stage=2),
            *(_plan(remat=remat, pp=2, schedule=s) for s in _TWO_SCHEDULES),
            _plan(remat=remat, pp=2, tp=2, dp_shard=2, stage=3, schedule="zero-bubble"),
        ]
    return plans


def _ladder() -> dict[str, Entry]:
    """Models whose residual is a ladder, whole and from the second layer on."""
    plans = [_plan(tp=tp, is_sequence_parallel=False) for tp in (2, 3)]
    plans += [_plan(dp_shard=2, stage=stage) for stage in _STAGES]
    plans += [_plan(dp_shard=2, stage=3, sharder="own")]
    for remat in _REMATS[1:]:
        plans += [
            _plan(remat=remat, tp=2, is_sequence_parallel=False),
            _plan(remat=remat, tp=2, dp_shard=2, stage=3, is_sequence_parallel=False),
            _plan(remat=remat, dp_shard=2, stage=3),
        ]
    return {
        f"{name_of(plan)}, {words}": Entry(plan, replace(tiny_spec(plan), ladder_from=first))
        for plan in plans
        for first, words in enumerate(("ladder", "ladder from layer 1"))
    }
