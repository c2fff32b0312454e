"""Rules of one key each."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
from collections.abc import Iterator

from paceline.core.errors import Problem, name_hint
from paceline.plan.mesh import AXES
from paceline.plan.plan import LimitsConfig, Plan
from paceline.plan.rules.known import Known, value_at

NOT_BUILT: dict[str, tuple[object, ...]] = {
    "precision.params": ("float32", "float64"),
    "replicas.method": ("all-reduce",),
    "serve.draft": ("none",),
    "serve.mesh.ep": (1,),
    "serve.mesh.replicas": (1,),
}
"""Key to the values that this version runs; absent keys run with any value that parses."""


NAMED: dict[str, str] = {
    "expert.dispatch": "paceline.parallel.expert:DISPATCHES",
    "optimizer.name": "paceline.optim:OPTIMIZERS",
    "peft.method": "paceline.models.peft:PEFT",
    "serve.policy": "paceline.serve.schedule:POLICIES",
}
"""Key to the name table of its family, imported when a plan is checked."""


POSITIVE = (
    *(f"mesh.{axis}" for axis in (*AXES, "ep")),
    "pipeline.stages_per_rank",
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
    "checkpoint.overhead_share",
    "resilience.patience",
    "serve.max_batch_tokens",
    "serve.max_sequences",
    "serve.mesh.tp",
    "serve.mesh.pp",
    *(f"serve.limits.{key.name}" for key in dataclasses.fields(LimitsConfig)),
)


NOT_NEGATIVE = (
    "expert.balance_loss_weight",
    "train.seed",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.schedule.warmup_steps",
    "optimizer.schedule.final_fraction",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.buffer_bytes",
    "resilience.max_restarts",
)


OPTIONAL_COUNTS = (
    "pipeline.num_microbatches",
    "context.ulysses_degree",
    "checkpoint.interval_steps",
    "serve.kv_memory_bytes",
)


def signs(known: Known) -> Iterator[Problem]:
    """Counts are positive, and quantities finite."""
    for path in POSITIVE:
        if not 0 < value_at(known.plan, path) < math.inf:
            yield known.problem(path, "must be positive and finite", _usual(path, "1 or more"))
    for path in NOT_NEGATIVE:
        if not 0 <= value_at(known.plan, path) < math.inf:
            yield known.problem(path, "must be finite and not negative", "use 0 or more")
    for path in OPTIONAL_COUNTS:
        value = value_at(known.plan, path)
        if isinstance(value, int) and value <= 0:
            yield known.problem(path, "must be positive", "use 1 or more")


def _usual(path: str, count: str) -> str:
    """What to use for a quantity: a number that counts, or else its default."""
    usual = value_at(Plan(), path)
    return f"use {count}" if isinstance(usual, int) else f"use {usual}, the default"


def betas(known: Known) -> Iterator[Problem]:
    """Decays of the optimizer."""
    path = "optimizer.betas"
    betas = value_at(known.plan, path)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        hint = f"use {json.dumps(value_at(Plan(), path))}"
        yield known.problem(path, "must be two numbers from 0 to below 1", hint)


def not_built(known: Known) -> Iterator[Problem]:
    """What this version has."""
    for path, built in NOT_BUILT.items():
        if value_at(known.plan, path) not in built:
            values = ", ".join(json.dumps(v) for v in built if v is not None)
            hint = f"use {values}" if values else "leave it out"
            yield known.problem(path, "is not built in this version", hint)


def levels(known: Known) -> Iterator[Problem]:
    """Where checkpoints go."""
    named = known.plan.checkpoint.levels
    if not named or "" in named or len(set(named)) < len(named):
        rule = "must name one level or more, each once"
        yield known.problem("checkpoint.levels", rule, 'use ["memory", "disk"]')


def names(known: Known) -> Iterator[Problem]:
    """Names of techniques that are looked up in a table."""
    for path, location in NAMED.items():
        module, attribute = location.split(":")
        table = getattr(importlib.import_module(module), attribute)
        name = value_at(known.plan, path)
        if name not in table:
            yield known.problem(path, f"is no {table.kind}", name_hint(name, table))
