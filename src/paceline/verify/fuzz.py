"""Plans and tiny models drawn at random, each of which is certified or refused.

Every factorisation of 2 to 8 ranks over the five axes can come up, with experts shared out over any
part of them, every schedule, ZeRO stage and way of sharing sequences, words at the edges or spread,
every family, with a ladder residual or without, and sizes that nothing divides. What is drawn is a
function of the seed and of its number, so any of them can be drawn again alone.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from paceline.core import rng
from paceline.core.errors import RankError
from paceline.models.families import FAMILIES, family
from paceline.models.peft import PEFT
from paceline.models.weights import RandomWeights
from paceline.parallel.context import METHODS
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.check import check
from paceline.plan.mesh import AXES, MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import (
    ContextConfig,
    ExpertConfig,
    MemoryConfig,
    PeftConfig,
    PipelineConfig,
    Plan,
    TensorConfig,
    TrainConfig,
    ZeroConfig,
)
from paceline.plan.rules.known import divisors
from paceline.verify.certify import certify
from paceline.verify.matrix import name_of
from paceline.verify.tiny import fitted

T = TypeVar("T")

_MIN_RANKS, _MAX_RANKS = 2, 8
_MAX_SEQUENCES = 2  # of a micro-batch
_MAX_LENGTH = 29
_MAX_ROUNDS = 3  # of micro-batches, where they come in rounds
_BALANCE_WEIGHT = 0.05


@dataclass(slots=True)
class FuzzReport:
    """What became of the plans.

    Attributes:
        drawn: plans.
        refused: of these, by `paceline.plan.check`.
        certified: of these, within the bound.
        failed: plan, as TOML, and why it is neither.
        worst: the largest error of those that are certified, and where it is.
        reasons: refused plans by the rule.
    """

    drawn: int = 0
    refused: int = 0
    certified: int = 0
    failed: list[dict[str, str]] = field(default_factory=list)
    worst: str = ""
    reasons: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one plan.

    Attributes:
        plan: that was drawn.
        title: it and its model in a few words.
        outcome: ``certified``, ``refused`` or ``failed``.
        error: the largest, of one that is certified.
        why: where the largest error is; the rule that refuses it; or how it failed.
    """

    plan: Plan
    title: str
    outcome: Literal["certified", "refused", "failed"]
    error: float
    why: str


def fuzz(count: int, seed: int, *, advance: Callable[[str], None] = lambda _: None) -> FuzzReport:
    """Certifies random plans.

    Args:
        count: of plans.
        seed: of the draws.
        advance: told of each plan what became of it.
    """
    report, largest = FuzzReport(), -1.0
    for number in range(count):
        found = trial(seed, number)
        advance(f"{found.title}: {_said(found)}")
        report.drawn += 1
        if found.outcome == "refused":
            report.refused += 1
            report.reasons[found.why] += 1
        elif found.outcome == "failed":
            why = f"plan {number}: {found.why}"
            report.failed.append({"plan": found.plan.to_toml(), "why": why})
        else:
            report.certified += 1
            if found.error > largest:
                largest, report.worst = found.error, f"plan {number}, {found.why}"
    return report


def _said(found: Trial) -> str:
    return f"{found.error:.1e}" if found.outcome == "certified" else f"{found.outcome}, {found.why}"


def trial(seed: int, number: int) -> Trial:
    """Draws a plan, and certifies it if it can run."""
    plan, spec = draw(seed, number)
    title = _title(plan, spec)
    if problems := check(plan, spec):
        return Trial(plan, title, "refused", 0.0, f"{problems[0].path}: {problems[0].rule}")
    try:
        certificate = certify(plan, spec, RandomWeights(spec, seed=number))
    except RankError as error:
        return Trial(plan, title, "failed", 0.0, str(error))
    errors = certificate.max_rel_grad_error, certificate.max_rel_param_error, certificate.loss_error
    outcome = "certified" if certificate.certified else "failed"
    return Trial(plan, title, outcome, max(errors), certificate.worst)


def _title(plan: Plan, spec: ModelSpec) -> str:
    """A plan in a few words."""
    peft = f", {plan.peft.method}" if plan.peft.method != "none" else ""
    ladder = f", ladder from {spec.ladder_from}" if spec.ladder_from is not None else ""
    return f"{spec.family}, {name_of(plan)}{peft}{ladder}"


class _Dice:
    """Draws that are a function of seed, number and what they are for."""

    def __init__(self, seed: int, number: int) -> None:
        self._seed, self._number = seed, number

    def pick(self, what: str, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        word = rng.bits(1, seed=self._seed, purpose="fuzz", stream=what, position=self._number)[0]
        return options[int(word) % len(options)]


def draw(seed: int, number: int) -> tuple[Plan, ModelSpec]:
    """The plan of a number, and the model that it is for."""
    dice = _Dice(seed, number)
    spec = family(dice.pick("family", list(FAMILIES))).PRESETS["tiny"]
    mesh, tensor = _mesh(dice, spec)
    pipeline, sequences = _pipeline(dice, mesh)
    length = dice.pick("length", range(3, _MAX_LENGTH + 1))
    stage: Any = dice.pick("zero", [0, 1, 2, 3]) if mesh.dp_shard > 1 else 0
    sharder: Any = dice.pick("sharder", ["auto", "own"]) if stage == 3 else "auto"
    is_alone = mesh.pp == mesh.tp == mesh.cp == mesh.ep == 1
    method = dice.pick("peft", ["none", "none", *PEFT]) if is_alone else "none"
    is_balanced = spec.moe is not None and method == "none" and dice.pick("balance", [True, False])
    plan = Plan(
        mesh=mesh,
        zero=ZeroConfig(stage=stage, sharder=sharder),
        tensor=tensor,
        pipeline=pipeline,
        context=_context(dice, mesh),
        expert=ExpertConfig(balance_loss_weight=_BALANCE_WEIGHT if is_balanced else 0.0),
        memory=_memory(dice, mesh),
        peft=PeftConfig(method=method),
        train=TrainConfig(
            sequence_length=length,
            tokens_per_step=length * sequences * mesh.num_data_ranks,
            freeze=() if method != "none" else _freeze(dice, spec),
            seed=number,
        ),
    )
    spec = fitted(spec, plan, spare_layers=dice.pick("spare layers", [0, 1, 2]))
    return replace(plan, pipeline=_with_cuts(dice, plan, spec)), _with_ladder(dice, plan, spec)


_FREEZES: tuple[tuple[str, ...], ...] = (
    (),  # the usual layer
    ("embedding.*",),
    ("*norm.*",),
    ("blocks.0.*",),
    ("blocks.*.attention.*",),
)


def _freeze(dice: _Dice, spec: ModelSpec) -> tuple[str, ...]:
    """Patterns of what is not trained.

    Where positions are not rotated, a bias of keys shifts all scores of a query alike: its gradient
    is zero in theory and rounding in practice, which the floor of the error formula takes for up to
    1e-12. There is nothing to certify in it.
    """
    is_shift = spec.qkv_bias and spec.positions == "learned"
    return (*dice.pick("freeze", _FREEZES), *(["*.attention.key.bias"] if is_shift else []))


def _mesh(dice: _Dice, spec: ModelSpec) -> tuple[MeshConfig, TensorConfig]:
    """One of all meshes of several ranks, and whether its tensor ranks split the tokens.

    Of a model with experts any of these ranks may share them out.
    """
    degrees = range(1, _MAX_RANKS + 1)
    shapes = [
        shape
        for shape in itertools.product(degrees, repeat=len(AXES))
        if _MIN_RANKS <= math.prod(shape) <= _MAX_RANKS
    ]
    mesh = MeshConfig(**dict(zip(AXES, dice.pick("mesh", shapes), strict=True)))
    splits_tokens = mesh.tp == 1 or dice.pick("sequence parallel", [True, False])
    if spec.moe is not None and splits_tokens:
        degrees_of_experts = divisors(mesh.dp_shard * mesh.cp * mesh.tp)
        mesh = replace(mesh, ep=dice.pick("experts", degrees_of_experts))
    return mesh, TensorConfig(sequence_parallel=splits_tokens)


def _pipeline(dice: _Dice, mesh: MeshConfig) -> tuple[PipelineConfig, int]:
    """A schedule, and the sequences of a data rank's step."""
    schedule: Any = dice.pick("schedule", list(SCHEDULES)) if mesh.pp > 1 else "one-f-one-b"
    traits: Any = SCHEDULES.load(schedule)
    most = traits.max_stages_per_rank or traits.min_stages_per_rank + 1
    per_rank = dice.pick("stages", range(traits.min_stages_per_rank, most + 1))
    rounds = dice.pick("rounds", range(1, _MAX_ROUNDS + 1))
    num_microbatches = rounds * traits.microbatch_unit(mesh.pp)
    can_spread = mesh.pp > 1 and mesh.tp == 1
    words: Any = dice.pick("words", ["edges", "spread"]) if can_spread else "edges"
    barriers: Any = dice.pick("barriers", [1, 2]) if words == "spread" else 1
    config = PipelineConfig(
        schedule=schedule,
        num_microbatches=num_microbatches,
        stages_per_rank=per_rank,
        vocabulary=words,
        vocabulary_barriers=barriers,
    )
    return config, num_microbatches * dice.pick("sequences", range(1, _MAX_SEQUENCES + 1))


def _context(dice: _Dice, mesh: MeshConfig) -> ContextConfig:
    if mesh.cp == 1:
        return ContextConfig()
    method: Any = dice.pick("context", list(METHODS))
    if method != "ulysses-ring":
        return ContextConfig(method=method)
    degrees = [None, *divisors(mesh.cp)]
    return ContextConfig(method=method, ulysses_degree=dice.pick("ulysses", degrees))


def _memory(dice: _Dice, mesh: MeshConfig) -> MemoryConfig:
    kept = ["full-keep-attention"] if mesh.cp > 1 else []
    remat: Any = dice.pick("remat", ["none", "selective", "full", *kept])
    return MemoryConfig(remat=remat)


def _with_ladder(dice: _Dice, plan: Plan, spec: ModelSpec) -> ModelSpec:
    """The model, in one of three draws that admit it with a ladder residual from some layer on."""
    mesh = plan.mesh
    admits = spec.norm_placement == "before" and mesh.pp == 1 and plan.peft.method == "none"
    if mesh.tp > 1:
        admits = admits and spec.moe is None and not plan.tensor.sequence_parallel
    if not admits or dice.pick("ladder", [False, False, True]) is False:
        return spec
    return replace(spec, ladder_from=dice.pick("first ladder layer", range(spec.num_layers)))


def _with_cuts(dice: _Dice, plan: Plan, spec: ModelSpec) -> PipelineConfig:
    """The plan's pipeline, in every other draw with cuts at random places."""
    num_stages = plan.mesh.pp * plan.pipeline.stages_per_rank
    if num_stages == 1 or not dice.pick("cuts", [True, False]):
        return plan.pipeline
    places = sorted(
        range(1, spec.num_layers), key=lambda place: dice.pick(f"cut {place}", range(1 << 30))
    )
    return replace(plan.pipeline, stage_cuts=tuple(sorted(places[: num_stages - 1])))
