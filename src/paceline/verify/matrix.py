"""The layouts that are certified one by one, by name. Pure data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from paceline.models.families import family
from paceline.parallel.context import METHODS
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    ContextConfig,
    ExpertConfig,
    MemoryConfig,
    PipelineConfig,
    Plan,
    TensorConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.verify.tiny import fitted, tiny_spec

_LENGTH = 17  # no number of ranks divides it
_SEQUENCES = 12  # of each data rank
_WINDOW = 5  # less than a chunk of two ranks, more than one of four
_TWO_SCHEDULES = ("one-f-one-b", "zero-bubble-v")
_STAGES = (0, 1, 2, 3)
_BARRIERS: tuple[Literal[1, 2], ...] = (1, 2)
_REMATS = ("none", "selective", "full")
_KEPT = "full-keep-attention"


class Entry(NamedTuple):
    """A layout that is certified, and the model that it is certified on."""

    plan: Plan
    spec: ModelSpec


def layouts() -> dict[str, Entry]:
    """Name to plan and model: each axis alone, axes together, rematerialisation; then spread words,
    shared sequences, experts and ladders, and these together.
    """
    plans = [*_tensor(), *_data(), *_pipeline(), *_together(), *_remat(), *_spread(), *_context()]
    found = {name_of(plan): Entry(plan, tiny_spec(plan)) for plan in plans}
    return found | _untied() | _windowed() | _sparse() | _ladder()


def name_of(plan: Plan) -> str:
    """A layout in words, as it differs from the defaults."""
    words = [
        " x ".join(f"{axis} {n}" for axis, n in plan.mesh.to_dict().items() if n > 1) or "one rank"
    ]
    if plan.mesh.pp > 1:
        words.append(plan.pipeline.schedule)
    if plan.pipeline.vocabulary == "spread":
        count = plan.pipeline.vocabulary_barriers
        words.append(f"words spread, {count} barrier{'s' * (count > 1)}")
    if plan.mesh.cp > 1:
        words.append(plan.context.method)
    if plan.mesh.dp_shard > 1:
        is_own = plan.zero.sharder == "own"
        words.append(f"ZeRO {plan.zero_stage}{', own sharder' if is_own else ''}")
    if plan.mesh.tp > 1 and not plan.tensor.sequence_parallel:
        words.append("no sequence parallel")
    if plan.memory.remat != "none":
        words.append(f"remat {plan.memory.remat}")
    if plan.expert.balance_loss_weight:
        words.append("balance loss")
    return ", ".join(words)


def _plan(
    *,
    stage: int | None = None,
    sharder: Literal["auto", "own"] = "auto",
    schedule: Any = None,
    remat: str = "none",
    method: str = "zigzag-ring",
    is_sequence_parallel: bool = True,
    barriers: Literal[0, 1, 2] = 0,
    balance_loss_weight: float = 0.0,
    **mesh: int,
) -> Plan:
    config = MeshConfig(**mesh)
    traits: Any = SCHEDULES.load(schedule) if schedule else None
    values: dict[str, Any] = {"remat": remat, "stage": stage, "method": method}
    return Plan(
        mesh=config,
        zero=ZeroConfig(stage=values["stage"], sharder=sharder),
        tensor=TensorConfig(sequence_parallel=is_sequence_parallel),
        pipeline=PipelineConfig(
            schedule=schedule or "one-f-one-b",
            stages_per_rank=traits.min_stages_per_rank if traits else 1,
            num_microbatches=_SEQUENCES if config.pp > 1 else _SEQUENCES // 2,
            vocabulary="spread" if barriers else "edges",
            vocabulary_barriers=barriers or 1,
        ),
        context=ContextConfig(method=values["method"]),
        memory=MemoryConfig(remat=values["remat"]),
        expert=ExpertConfig(balance_loss_weight=balance_loss_weight),
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


def _spread() -> list[Plan]:
    """Words spread over the ranks of a pipeline."""
    plans = [
        _plan(pp=pp, schedule=schedule, barriers=barriers)
        for pp in (2, 3, 4)
        for schedule in SCHEDULES
        for barriers in _BARRIERS
    ]
    for stage in _STAGES:
        plans += [
            _plan(pp=2, dp_shard=2, stage=stage, schedule=schedule, barriers=barriers)
            for schedule in _TWO_SCHEDULES
            for barriers in _BARRIERS
        ]
    plans += [_plan(pp=2, dp_replicate=2, schedule="v-half", barriers=n) for n in _BARRIERS]
    plans += [_plan(pp=2, remat="full", schedule=s, barriers=1) for s in _TWO_SCHEDULES]
    plans += [_plan(pp=2, cp=2, schedule="one-f-one-b", barriers=n) for n in _BARRIERS]
    return plans


def _untied() -> dict[str, Entry]:
    """The same with a head that is no embedding, of which each rank has words too."""
    plans = [
        _plan(pp=pp, schedule=schedule, barriers=barriers)
        for pp, schedule in ((2, "one-f-one-b"), (3, "v-half"), (4, "interleaved"))
        for barriers in _BARRIERS
    ]
    plans += [_plan(pp=2, dp_shard=2, stage=stage, barriers=1) for stage in _STAGES[1:]]
    return {
        f"{name_of(plan)}, untied": Entry(plan, replace(tiny_spec(plan), tied_embeddings=False))
        for plan in plans
    }


def _context_alone() -> list[Plan]:
    return [_plan(cp=cp, method=method) for cp in (2, 3, 4) for method in METHODS]


def _context() -> list[Plan]:
    plans = _context_alone()
    for method in METHODS:
        plans += [
            _plan(cp=2, tp=2, method=method),
            _plan(cp=2, pp=2, method=method, schedule="zero-bubble"),
            _plan(cp=2, dp_shard=2, stage=3, method=method),
            *(_plan(cp=2, method=method, remat=remat) for remat in (*_REMATS[1:], _KEPT)),
        ]
    plans += [_plan(cp=2, dp_shard=2, stage=stage) for stage in _STAGES]
    plans += [_plan(cp=2, dp_shard=2, stage=3, sharder="own")]
    plans += [_plan(cp=2, pp=2, schedule=schedule) for schedule in SCHEDULES]
    plans += [_plan(cp=2, pp=2, tp=2, schedule=schedule) for schedule in _TWO_SCHEDULES]
    plans += [
        _plan(cp=2, tp=3, is_sequence_parallel=False),
        _plan(cp=2, dp_replicate=2),
        _plan(cp=2, dp_replicate=2, dp_shard=2, stage=2),
        _plan(cp=2, dp_replicate=2, dp_shard=2, stage=3),
        _plan(cp=2, pp=2, dp_shard=2, stage=3, schedule="zero-bubble-v", remat=_KEPT),
    ]
    return plans


def _windowed() -> dict[str, Entry]:
    """Shared sequences again, of a model most of whose layers see a few tokens."""
    specs = {plan: replace(tiny_spec(plan), window=_WINDOW) for plan in _context_alone()}
    return {
        f"{name_of(plan)}, window": Entry(plan, replace(spec, global_layers=(0,)))
        for plan, spec in specs.items()
    }


_BALANCE = 0.3  # large enough for its gradient to be among the others'
_SPARSE = ("mixtral", "qwen2-moe", "pangu-moe")


def _experts() -> list[tuple[str, Plan]]:
    """Families with experts, and plans for them, of which all but one balance the load."""
    plans = [(name, _balanced(ep=ep, dp_shard=ep)) for name in _SPARSE for ep in (2, 4)]
    plans += [(name, _balanced()) for name in _SPARSE]
    plans += [("pangu-moe", _balanced(tp=2, is_sequence_parallel=way)) for way in (True, False)]
    plans += [("qwen2-moe", _balanced(ep=2, tp=2)), ("mixtral", _balanced(ep=4, tp=2, dp_shard=2))]
    plans.append(("mixtral", _plan(ep=2, dp_shard=2)))
    for stage in _STAGES:
        plans.append(("mixtral", _balanced(ep=2, dp_shard=4, stage=stage)))
        plans.append(("pangu-moe", _balanced(ep=2, dp_shard=2, tp=2, stage=stage)))
        plans.append(("qwen2-moe", _balanced(ep=2, dp_replicate=2, dp_shard=2, stage=stage)))
        more = _balanced(pp=2, ep=2, dp_shard=2, stage=stage, schedule="one-f-one-b")
        plans.append(("mixtral", more))
    for schedule in ("zero-bubble", "zero-bubble-v"):
        plans += [(n, _balanced(pp=2, ep=2, dp_shard=2, schedule=schedule)) for n in _SPARSE]
    own = [_balanced(ep=2, dp_shard=n, stage=3, sharder="own") for n in (2, 4)]
    plans += [("qwen2-moe", plan) for plan in own]
    plans.append(("mixtral", _balanced(ep=2, dp_replicate=2, dp_shard=4, stage=1)))
    for remat in _REMATS[1:]:
        plans.append(("pangu-moe", _balanced(ep=2, dp_shard=2, remat=remat)))
        plans.append(("qwen2-moe", _balanced(ep=2, tp=2, dp_shard=2, remat=remat)))
    plans += [(name, _balanced(cp=2)) for name in _SPARSE]
    plans += [("mixtral", _balanced(ep=2, cp=2)), ("qwen2-moe", _balanced(ep=4, cp=2, tp=2))]
    plans.append(("pangu-moe", _balanced(ep=4, cp=2, dp_shard=2, method="ring", stage=2)))
    plans.append(("mixtral", _balanced(pp=2, ep=2, dp_shard=2, barriers=1)))
    return plans


def _balanced(**options: Any) -> Plan:
    return _plan(balance_loss_weight=_BALANCE, **options)


def _with_experts(name: str, plan: Plan) -> ModelSpec:
    """A tiny model of a family that admits a plan."""
    return fitted(family(name).PRESETS["tiny"], plan, spare_layers=1)


def _sparse() -> dict[str, Entry]:
    """Models with experts."""
    entries = [Entry(plan, _with_experts(name, plan)) for name, plan in _experts()]
    return {f"{name_of(plan)}, {spec.family}": Entry(plan, spec) for plan, spec in entries}


def _ladder() -> dict[str, Entry]:
    """Models whose residual is a ladder, whole and from the second layer on."""
    plans = [_plan(tp=tp, is_sequence_parallel=False) for tp in (2, 3)]
    plans += [_plan(dp_shard=2, stage=stage) for stage in _STAGES]
    plans += [_plan(dp_shard=2, stage=3, sharder="own"), _plan(cp=2)]
    plans += [_plan(cp=2, tp=2, is_sequence_parallel=False, method="ulysses")]
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
