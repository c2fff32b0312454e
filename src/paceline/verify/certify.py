"""Certification: every gradient, weight, loss, norm, clip factor and token count of a plan against
the oracle, and the loss of an evaluation between steps.

The hard cases are always in play, because this field's bugs live there: ranks with unequal numbers
of valid tokens, accumulation, a clip that bites, a layer that is frozen in one case and trained in
the other, and tied embeddings where the model has them. SGD with momentum is run beside AdamW,
which hides a wrong scale.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from paceline.core import rng
from paceline.data.loader import Loader
from paceline.data.store import TokenStore
from paceline.dist.testing import run_ranks
from paceline.dist.world import World
from paceline.models.peft.attach import attach
from paceline.models.weights import RandomWeights, Weights, build, fill
from paceline.optim import OPTIMIZERS
from paceline.optim.schedule import learning_rate
from paceline.parallel.apply import apply, freeze
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Schedule
from paceline.plan.batch import batch_shape
from paceline.plan.layout import Box, Place
from paceline.plan.mesh import MeshConfig
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan, PrecisionConfig, ZeroConfig
from paceline.train.evaluate import Evaluation, evaluate
from paceline.train.objective.next_token import next_token
from paceline.train.state import State
from paceline.train.step import StepResult, compute_gradients, move_weights
from paceline.verify.compare import (
    Piece,
    gradient_errors,
    relative_error,
    uncovered,
    weight_errors,
)
from paceline.verify.oracle import OracleStep, run_oracle
from paceline.verify.tiny import tiny_spec

BOUND = 1e-12
_NUM_STEPS = 2
_CLIP_NORM = 0.1
_ADAM_EPS = 1e-4  # a smaller one amplifies rounding where gradients vanish
_MAX_LENGTH = 33
_DISTURBANCE = 0.1
_NUM_MICROBATCHES = 3
_MAX_MICROBATCH_SEQUENCES = 2
_EVALUATED_TOGETHER = 2  # of at least three micro-batches: groups need not be equal


class Case(NamedTuple):
    """What is in play beside the plan.

    Attributes:
        optimizer: its name.
        pack: whether documents are packed.
        is_frozen: whether a layer is frozen where neither the plan nor its fine-tuning says what
            is trained. In one case none is, so that every gradient is compared in some case.
    """

    optimizer: str
    pack: bool
    is_frozen: bool


CASES = {
    "sgd, packed": Case("sgd", pack=True, is_frozen=False),
    "adamw, padded": Case("adamw", pack=False, is_frozen=True),
}


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far a plan's training is from the oracle's; largest errors over ranks, steps and cases.

    Attributes:
        certified: whether all errors are within `BOUND`.
        max_rel_grad_error: of gradients, of their norm, the clip factor and the count of tokens.
        max_rel_param_error: of weights after the steps.
        loss_error: of losses, of steps and of an evaluation between them, relative.
        worst: the case, step and parameter with the largest error.
        per_parameter: parameter to its largest gradient error and weight error.
    """

    certified: bool
    max_rel_grad_error: float
    max_rel_param_error: float
    loss_error: float
    worst: str
    per_parameter: dict[str, dict[str, float]]


@dataclass(slots=True)
class _Errors:
    """Largest errors so far, by what they are of."""

    gradients: dict[str, float]
    weights: dict[str, float]
    losses: dict[str, float]
    worst: tuple[float, str]
    gradient_boxes: dict[str, set[Box]]
    weight_boxes: dict[str, set[Box]]

    @classmethod
    def none(cls) -> _Errors:
        return cls({}, {}, {}, (0.0, "none"), {}, {})

    def add(self, kind: dict[str, float], found: Mapping[str, float], where: str) -> None:
        for name, error in found.items():
            error = _finite(error)
            kind[name] = max(kind.get(name, 0.0), error)
            self.worst = max(self.worst, (error, f"{name}, {where}"))

    def merge(self, other: _Errors) -> None:
        pairs = (
            (self.gradients, other.gradients),
            (self.weights, other.weights),
            (self.losses, other.losses),
        )
        for mine, theirs in pairs:
            for name, error in theirs.items():
                mine[name] = max(mine.get(name, 0.0), error)
        self.worst = max(self.worst, other.worst)
        _join(self.gradient_boxes, other.gradient_boxes)
        _join(self.weight_boxes, other.weight_boxes)


def _join(boxes: dict[str, set[Box]], others: Mapping[str, set[Box]]) -> None:
    for name, of_name in others.items():
        boxes.setdefault(name, set()).update(of_name)


def _finite(error: float) -> float:
    """The error as JSON can hold it; NaN, which no comparison would catch, is the largest."""
    return error if math.isfinite(error) else sys.float_info.max


def certify(
    plan: Plan,
    spec: ModelSpec | None = None,
    weights: Weights | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Certificate:
    """Trains two steps as the plan lays them out and as the oracle does, and compares.

    Args:
        plan: its layout is certified; sizes of batches are reduced, precision is float64.
        spec: sizes of the model; by default a tiny one that admits the plan.
        weights: of the model; by default random.
        say: told of each case as it begins.
    """
    spec = spec or tiny_spec(plan)
    weights = weights or RandomWeights(spec)
    errors = _Errors.none()
    for name, case in CASES.items():
        say(f"comparing with the oracle: {name}")
        errors.merge(_certify_case(name, _hard(plan, spec, case), spec, weights))
    gradient_error = max(errors.gradients.values())
    weight_error = max(errors.weights.values())
    loss_error = max(errors.losses.values())
    return Certificate(
        certified=max(gradient_error, weight_error, loss_error) <= BOUND,
        max_rel_grad_error=gradient_error,
        max_rel_param_error=weight_error,
        loss_error=loss_error,
        worst=f"{errors.worst[1]}: {errors.worst[0]:.1e}",
        per_parameter={
            name: {"gradient": errors.gradients.get(name, 0.0), "weight": weight}
            for name, weight in errors.weights.items()
        },
    )


def _hard(plan: Plan, spec: ModelSpec, case: Case) -> Plan:
    """The plan in float64, small, with the hard cases in play."""
    shape = batch_shape(plan)
    room = spec.max_positions - plan.peft.num_virtual_tokens
    length = min(plan.train.sequence_length, _MAX_LENGTH, room)
    schedule: Schedule = SCHEDULES.load(plan.pipeline.schedule)
    unit = schedule.microbatch_unit(plan.mesh.pp)
    rounds = -(-_NUM_MICROBATCHES // unit)
    num_microbatches = plan.pipeline.num_microbatches or rounds * unit
    sequences = num_microbatches * min(shape.microbatch_sequences, _MAX_MICROBATCH_SEQUENCES)
    return replace(
        plan,
        precision=PrecisionConfig(params="float64", compute="float64", reduce="float64"),
        pipeline=replace(plan.pipeline, num_microbatches=num_microbatches),
        train=replace(
            plan.train,
            sequence_length=length,
            tokens_per_step=length * sequences * shape.num_data_ranks,
            pack=case.pack,
            freeze=plan.train.freeze or _usual_freeze(plan, case),
        ),
        optimizer=replace(
            plan.optimizer, name=case.optimizer, eps=_ADAM_EPS, clip_norm=_CLIP_NORM, lr=0.01
        ),
    )


def _usual_freeze(plan: Plan, case: Case) -> tuple[str, ...]:
    return ("blocks.0.ffn.*",) if case.is_frozen and plan.peft.method == "none" else ()


class _Disturbed:
    """What fine-tuning adds, away from its start values, at which many gradients are zero."""

    def __init__(self, plan: Plan, spec: ModelSpec, weights: Weights) -> None:
        model = build(spec)
        self._start = attach(model, plan.peft, weights, seed=plan.train.seed).weights
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def read(self, name: str) -> Tensor:
        shape = self._shapes[name]
        draws = rng.normal(shape.numel(), seed=0, purpose="verify adapter", stream=name)
        return self._start.read(name) + _DISTURBANCE * torch.from_numpy(draws).view(shape)


def _certify_case(case: str, plan: Plan, spec: ModelSpec, weights: Weights) -> _Errors:
    store = _documents(plan, spec)
    expected = _oracle_steps(plan, spec, weights, store)
    mesh = plan.mesh

    def run(rank: int) -> _Errors:
        # Forked ranks see the oracle's results: only errors travel back.
        world = World(mesh, rank, torch.device("cpu"))
        return _compare(case, plan, spec, weights, store, world, expected)

    errors = _Errors.none()
    num_ranks = mesh.num_ranks
    found = [run(0)] if num_ranks == 1 else run_ranks(run, num_ranks, timeout_s=600, mesh=mesh)
    for of_rank in found:
        errors.merge(of_rank)
    for name in uncovered(errors.gradient_boxes, expected[0].gradients):
        errors.add(errors.gradients, {name: math.inf}, f"{case}, ranks lack some of its gradient")
    for name in uncovered(errors.weight_boxes, expected[0].weights):
        errors.add(errors.weights, {name: math.inf}, f"{case}, ranks lack some of it")
    return errors


def _oracle_steps(
    plan: Plan, spec: ModelSpec, weights: Weights, store: TokenStore
) -> list[OracleStep]:
    alone = replace(plan, mesh=MeshConfig(), zero=ZeroConfig())
    model = build(spec, torch.float64)
    added = _Disturbed(plan, spec, weights)
    attached = attach(model, plan.peft, weights, seed=plan.train.seed, added=added)
    fill(model, attached.weights, torch.device("cpu"))
    freeze(model, plan.train.freeze)
    return run_oracle(model, Loader(store, alone, end_token=0), plan, _NUM_STEPS)


def _compare(
    case: str,
    plan: Plan,
    spec: ModelSpec,
    weights: Weights,
    store: TokenStore,
    world: World,
    expected: list[OracleStep],
) -> _Errors:
    """Trains on this rank and compares everything that it can see."""
    model = apply(spec, weights, plan, world, added=_Disturbed(plan, spec, weights))
    state = State(model, OPTIMIZERS.load(plan.optimizer.name)(model.parameters(), plan.optimizer))
    loader = Loader(store, plan, end_token=0)
    errors = _Errors.none()
    for step, oracle in enumerate(expected, start=1):
        batches = loader.microbatches(step, world.data_index)
        limit = plan.optimizer.clip_norm
        result = compute_gradients(state, batches, next_token, world, max_norm=limit)
        gradients = _pieces({n: (part.gradient, part.place) for n, part in model.parts.items()})
        _join(errors.gradient_boxes, {name: {box} for name, (_, box) in gradients.items()})
        where = f"{case}, step {step}, rank {world.rank}"
        errors.add(errors.gradients, gradient_errors(gradients, oracle.gradients), where)
        errors.add(errors.gradients, _scale_errors(result, oracle), where)
        move_weights(state, learning_rate(plan.optimizer, step, _NUM_STEPS))
        found = _pieces({n: (part.local.detach(), part.place) for n, part in model.parts.items()})
        _join(errors.weight_boxes, {name: {box} for name, (_, box) in found.items()})
        errors.add(errors.weights, weight_errors(found, oracle.weights), where)
        errors.add(errors.losses, {"loss": relative_error(result.loss, oracle.loss)}, where)
        if step < len(expected):  # between steps, where it could leave something behind
            after = evaluate(
                model, batches, next_token, world, num_microbatches=_EVALUATED_TOGETHER
            )
            errors.add(errors.losses, _evaluation_errors(after, oracle), where)
    return errors


def _evaluation_errors(after: Evaluation, oracle: OracleStep) -> dict[str, float]:
    return {
        "loss of an evaluation": relative_error(after.loss, oracle.loss_after),
        "tokens of an evaluation": relative_error(after.tokens, oracle.valid_tokens),
    }


def _scale_errors(result: StepResult, oracle: OracleStep) -> dict[str, float]:
    return {
        "gradient norm": relative_error(result.grad_norm, oracle.grad_norm),
        "clip factor": relative_error(result.clip_factor, oracle.clip_factor),
        "valid tokens": relative_error(result.valid_tokens, oracle.valid_tokens),
    }


def _pieces(named: Mapping[str, tuple[Tensor | None, Place]]) -> dict[str, Piece]:
    """What there is and is not empty."""
    found = {name: (tensor, place.box) for name, (tensor, place) in named.items()}
    return {n: (t, box) for n, (t, box) in found.items() if t is not None and box.num_elements}


def _documents(plan: Plan, spec: ModelSpec) -> TokenStore:
    """Documents of random lengths, many shorter than a sequence and some longer."""
    length, shape = plan.train.sequence_length, batch_shape(plan)
    count = 4 * shape.sequences_per_step
    draws = rng.bits(count, seed=plan.train.seed, purpose="verify lengths")
    lengths = 2 + (draws % np.uint64(2 * length)).astype(np.int64)
    ids = rng.bits(int(lengths.sum()), seed=plan.train.seed, purpose="verify tokens")
    tokens = (ids % np.uint64(spec.vocab_size)).astype(np.uint32)
    return TokenStore(tokens, np.cumsum(lengths))
