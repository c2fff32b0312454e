"""The one place for rules between techniques: `check` returns every problem of a plan at once.

A rule is a function from what is known (the plan, and the model and the number of ranks where
there are any) to problems. What this version has not built is in `NOT_BUILT`; a plan that asks
for it is refused.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from paceline.core.config import Config
from paceline.core.errors import ConfigError, Problem, name_hint
from paceline.plan.mesh import AXES
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig, Plan

NOT_BUILT: dict[str, tuple[object, ...]] = {
    "mesh.pp": (1,),
    "mesh.cp": (1,),
    "mesh.tp": (1,),
    "mesh.ep": (1,),
    "tensor.sequence_parallel": (True,),
    "pipeline.schedule": ("one-f-one-b",),
    "pipeline.stages_per_rank": (1,),
    "pipeline.stage_cuts": (None,),
    "pipeline.vocabulary": ("edges",),
    "context.method": ("zigzag-ring",),
    "expert.dispatch": ("all-to-all",),
    "expert.balance_loss_weight": (0.0,),
    "memory.remat": ("none",),
    "precision.params": ("float32", "float64"),
    "replicas.method": ("all-reduce",),
    "checkpoint.overhead_share": (0.02,),
    "checkpoint.levels": (("disk",),),
    "resilience.on_failure": ("stop",),
    "resilience.max_restarts": (0,),
    "serve.kv_memory_bytes": (None,),
    "serve.weights": ("auto",),
    "serve.max_sequences": (1,),
    "serve.draft": ("none",),
    "serve.mesh.tp": (1,),
    "serve.mesh.pp": (1,),
    "serve.mesh.ep": (1,),
    "serve.mesh.replicas": (1,),
}
"""Key to the values that this version runs; absent keys run with any value that parses."""

NAMED: dict[str, str] = {
    "optimizer.name": "paceline.optim:OPTIMIZERS",
    "peft.method": "paceline.models.peft:PEFT",
    "serve.policy": "paceline.serve.schedule:POLICIES",
}
"""Key to the name table of its family, imported when a plan is checked."""

PEFT_KEYS: dict[str, tuple[str, ...]] = {
    "targets": ("lora", "dora", "ia3", "bottleneck"),
    "rank": ("lora", "dora"),
    "alpha": ("lora", "dora"),
    "virtual_tokens": ("prefix", "prompt"),
    "width": ("bottleneck",),
}
"""Key of ``[peft]`` to the methods that read it."""

POSITIVE = (
    *(f"mesh.{axis}" for axis in (*AXES, "ep")),
    "train.sequence_length",
    "train.tokens_per_step",
    "train.microbatch_tokens",
    "train.eval_interval_steps",
    "train.eval_tokens",
    "peft.rank",
    "peft.alpha",
    "peft.virtual_tokens",
    "peft.width",
    "optimizer.lr",
    "optimizer.eps",
    "serve.max_batch_tokens",
    "serve.max_sequences",
)
NOT_NEGATIVE = (
    "train.seed",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.schedule.warmup_steps",
    "optimizer.schedule.final_fraction",
    "checkpoint.keep",
)


@dataclass(frozen=True, slots=True)
class Known:
    """What a rule may look at."""

    plan: Plan
    spec: ModelSpec | None
    num_ranks: int | None


Rule = Callable[[Known], Iterator[Problem]]


def check(
    plan: Plan, spec: ModelSpec | None = None, *, num_ranks: int | None = None
) -> list[Problem]:
    """Every problem of a plan, for a model and a number of ranks where they are given."""
    known = Known(plan, spec, num_ranks)
    problems = [problem for rule in BASIC_RULES for problem in rule(known)]
    # Rules between keys assume that each key makes sense alone.
    return problems or [problem for rule in RULES for problem in rule(known)]


def require(
    plan: Plan, spec: ModelSpec | None = None, *, num_ranks: int | None = None, source: str = ""
) -> None:
    """Raises ConfigError with every problem, if there is one."""
    if problems := check(plan, spec, num_ranks=num_ranks):
        raise ConfigError(problems, source=source)


def value_at(config: Config, path: str) -> Any:
    """The value at a dotted path."""
    value: Any = config
    for key in path.split("."):
        value = getattr(value, key)
    return value


def _problem(known: Known, path: str, rule: str, hint: str = "") -> Problem:
    return Problem(path, json.dumps(value_at(known.plan, path)), rule, hint)


def _signs(known: Known) -> Iterator[Problem]:
    for path in POSITIVE:
        if not 0 < value_at(known.plan, path) < math.inf:
            yield _problem(known, path, "must be positive and finite")
    for path in NOT_NEGATIVE:
        if not 0 <= value_at(known.plan, path) < math.inf:
            yield _problem(known, path, "must be finite and not negative")
    for path in ("pipeline.num_microbatches", "checkpoint.interval_steps"):
        value = value_at(known.plan, path)
        if isinstance(value, int) and value <= 0:
            yield _problem(known, path, "must be positive")


def _betas(known: Known) -> Iterator[Problem]:
    betas = known.plan.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        yield _problem(known, "optimizer.betas", "must be two numbers from 0 to below 1")


def _not_built(known: Known) -> Iterator[Problem]:
    for path, built in NOT_BUILT.items():
        if value_at(known.plan, path) not in built:
            values = ", ".join(json.dumps(v) for v in built if v is not None)
            hint = f"use {values}" if values else "leave it out"
            yield _problem(known, path, "is not built in this version", hint)
    if known.plan.checkpoint.interval_steps == "auto":
        path = "checkpoint.interval_steps"
        yield _problem(known, path, "is not built in this version", "give a number of steps")


def _names(known: Known) -> Iterator[Problem]:
    for path, location in NAMED.items():
        module, attribute = location.split(":")
        table = getattr(importlib.import_module(module), attribute)
        name = value_at(known.plan, path)
        if name not in table:
            yield _problem(known, path, f"is no {table.kind}", name_hint(name, table))


def _ranks(known: Known) -> Iterator[Problem]:
    need = known.plan.mesh.num_ranks
    if known.num_ranks is not None and known.num_ranks != need:
        degrees = " x ".join(f"{axis} {getattr(known.plan.mesh, axis)}" for axis in AXES)
        rule = f"{degrees} needs {need} rank(s), but there are {known.num_ranks}"
        yield Problem("mesh", str(need), rule, f"start {need} rank(s), or change [mesh]")


def _whole_batches(known: Known) -> Iterator[Problem]:
    train, num_data_ranks = known.plan.train, known.plan.mesh.num_data_ranks
    unit = train.sequence_length * num_data_ranks
    if train.tokens_per_step % unit:
        lower = train.tokens_per_step // unit * unit
        near = " or ".join(str(value) for value in (lower, lower + unit) if value)
        rule = f"must be a multiple of sequence_length x data ranks = {unit}"
        yield _problem(known, "train.tokens_per_step", rule, f"use {near}")
        return
    count = known.plan.pipeline.num_microbatches
    sequences = train.tokens_per_step // unit
    if count is not None and sequences % count:
        rule = f"must divide the {sequences} sequences of a rank's step"
        lower = next(n for n in range(min(count, sequences), 0, -1) if sequences % n == 0)
        yield _problem(known, "pipeline.num_microbatches", rule, f"use {lower}")


def _zero_needs_shards(known: Known) -> Iterator[Problem]:
    if known.plan.zero.stage and known.plan.mesh.dp_shard == 1:
        rule = "shares state over dp_shard ranks, of which there is one"
        yield _problem(known, "zero.stage", rule, "set mesh.dp_shard, or zero.stage = 0")


def _sharder_fits(known: Known) -> Iterator[Problem]:
    """Stage 3 alone has sharders, and torch's wants each backward pass in one piece."""
    sharder, path = known.plan.zero.sharder, "zero.sharder"
    if sharder != "auto" and known.plan.zero_stage != 3:
        rule = f"is for stage 3, and the stage in force is {known.plan.zero_stage}"
        yield _problem(known, path, rule, "leave it out, or set zero.stage = 3")
    elif sharder == "torch" and known.plan.mesh.pp > 1:
        rule = "does not go with mesh.pp > 1, whose backward passes come in parts"
        yield _problem(known, path, rule, 'use "own"')


def _one_float64(known: Known) -> Iterator[Problem]:
    precision = known.plan.precision
    values = [getattr(precision, field.name) for field in fields(precision)]
    if "float64" in values and set(values) != {"float64"}:
        path = f"precision.{fields(precision)[values.index('float64')].name}"
        yield _problem(known, path, "float64 is for params, compute and reduce alike")


def _context_fits(known: Known) -> Iterator[Problem]:
    if known.spec is None:
        return
    virtual, limit = known.plan.peft.num_virtual_tokens, known.spec.max_positions
    if known.plan.train.sequence_length + virtual > limit:
        behind = f", behind {virtual} virtual tokens," if virtual else ""
        rule = f"exceeds{behind} the model's context of {limit} tokens"
        yield _problem(known, "train.sequence_length", rule)


def _peft_alone(known: Known) -> Iterator[Problem]:
    """Fine-tuning freezes the model itself, and its options belong to methods."""
    peft, unset = known.plan.peft, PeftConfig()
    if peft.method != "none" and known.plan.train.freeze:
        rule = f"does not go with peft.method = {peft.method}, which freezes the whole model"
        yield _problem(known, "train.freeze", rule, "leave it out; peft.targets chooses layers")
    for key, methods in PEFT_KEYS.items():
        if peft.method not in methods and getattr(peft, key) != getattr(unset, key):
            rule = f"is not read by peft.method = {peft.method}"
            yield _problem(known, f"peft.{key}", rule, f"it is for {', '.join(methods)}")


BASIC_RULES: tuple[Rule, ...] = (_signs, _betas, _not_built, _names)
RULES: tuple[Rule, ...] = (
    _ranks,
    _whole_batches,
    _zero_needs_shards,
    _sharder_fits,
    _one_float64,
    _context_fits,
    _peft_alone,
)
