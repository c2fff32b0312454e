"""The one place for rules between techniques: `check` returns every problem of a plan at once.

A rule is a function from what is known (the plan, and the model and the number of ranks where
there are any) to problems. What this version has not built is in `NOT_BUILT`; a plan that asks
for it is refused.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from paceline.core.config import Config
from paceline.core.errors import ConfigError, Problem, name_hint
from paceline.plan.batch import batch_shape
from paceline.plan.mesh import AXES
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig, Plan

NOT_BUILT: dict[str, tuple[object, ...]] = {
    "mesh.cp": (1,),
    "mesh.ep": (1,),
    "pipeline.vocabulary": ("edges",),
    "context.method": ("zigzag-ring",),
    "expert.dispatch": ("all-to-all",),
    "expert.balance_loss_weight": (0.0,),
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


def require_for_module(plan: Plan) -> None:
    """Raises ConfigError if a user's own module cannot be laid as a plan says."""
    known = Known(plan, None, None)
    problems = check(plan) or [problem for rule in MODULE_RULES for problem in rule(known)]
    if problems:
        raise ConfigError(problems, source="the plan")


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


def _tensor_fits(known: Known) -> Iterator[Problem]:
    """Every rank has something of each matrix that is split."""
    degree, spec = known.plan.mesh.tp, known.spec
    if degree == 1:
        if not known.plan.tensor.sequence_parallel:
            path, rule = "tensor.sequence_parallel", "says how mesh.tp ranks share, which is 1"
            yield _problem(known, path, rule, "set mesh.tp, or leave it out")
        return
    if known.plan.train.compile == "on":
        rule = "has not been proved with mesh.tp > 1"
        yield _problem(known, "train.compile", rule, 'use "auto" or "off"')
    if known.plan.peft.method != "none":
        rule = "has not been proved with mesh.tp > 1"
        yield _problem(known, "peft.method", rule, 'use mesh.tp = 1, or peft.method = "none"')
    if spec is None:
        return
    for what, most in (
        ("query heads", spec.num_heads),
        ("columns of the feed-forward", spec.d_ffn),
        ("words of the vocabulary", spec.vocab_size),
    ):
        if degree > most:
            rule = f"exceeds the model's {most} {what}"
            yield _problem(known, "mesh.tp", rule, f"use at most {most}")
    if spec.qk_norm == "all" and spec.norm == "layer":
        rule = "cannot split a layer norm over all heads"
        yield _problem(known, "mesh.tp", rule, "use 1")


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


def _schedule(name: str) -> Any:
    """A pipeline schedule, for its traits."""
    return importlib.import_module("paceline.parallel.pipeline").SCHEDULES.load(name)


def _stages_per_rank(known: Known) -> Iterator[Problem]:
    pipeline = known.plan.pipeline
    schedule, count = _schedule(pipeline.schedule), pipeline.stages_per_rank
    least, most = schedule.min_stages_per_rank, schedule.max_stages_per_rank
    if count < least or (most is not None and count > most):
        legal = f"{least}" if least == most else f"{least} or more"
        rule = f"does not go with {pipeline.schedule}, which takes {legal} a rank"
        yield _problem(known, "pipeline.stages_per_rank", rule, f"use {legal}")


def _whole_rounds(known: Known) -> Iterator[Problem]:
    """A schedule may take its micro-batches in rounds of as many as there are pipeline ranks."""
    plan = known.plan
    unit = _schedule(plan.pipeline.schedule).microbatch_unit(plan.mesh.pp)
    sequences, rest = divmod(
        plan.train.tokens_per_step, plan.train.sequence_length * plan.mesh.num_data_ranks
    )
    if rest:  # `_whole_batches` tells
        return
    count = plan.pipeline.num_microbatches or batch_shape(plan).num_microbatches
    if count % unit:
        rule = f"{plan.pipeline.schedule} takes multiples of mesh.pp = {unit}, not {count}"
        legal = [n for n in range(unit, sequences + 1, unit) if sequences % n == 0]
        tokens = unit * plan.train.sequence_length * plan.mesh.num_data_ranks
        other = f"make train.tokens_per_step a multiple of {tokens}"
        hint = f"use {_nearest(count, legal)}" if legal else other
        yield _problem(known, "pipeline.num_microbatches", rule, hint)


def _nearest(value: int, legal: Sequence[int]) -> str:
    """The legal values on both sides of one, as text."""
    below = [n for n in legal if n < value][-1:]
    return " or ".join(map(str, below + [n for n in legal if n > value][:1]))


def _stages_have_layers(known: Known) -> Iterator[Problem]:
    pp, per_rank = known.plan.mesh.pp, known.plan.pipeline.stages_per_rank
    if known.spec is not None and pp * per_rank > known.spec.num_layers:
        num_layers = known.spec.num_layers
        rule = f"makes {pp * per_rank} stages, but the model has {num_layers} layer(s)"
        most = num_layers // per_rank
        hint = f"use at most {most}" if most else f"stages_per_rank is at most {num_layers}"
        yield _problem(known, "mesh.pp", rule, hint)


def _stage_cuts(known: Known) -> Iterator[Problem]:
    pipeline = known.plan.pipeline
    cuts, num_stages = pipeline.stage_cuts, known.plan.mesh.pp * pipeline.stages_per_rank
    if cuts is None:
        return
    path, hint = "pipeline.stage_cuts", "leave it out: stages of even cost"
    if len(cuts) != num_stages - 1:
        rule = f"must have one cut less than there are stages, {num_stages - 1}"
        yield _problem(known, path, rule, hint)
    num_layers = math.inf if known.spec is None else known.spec.num_layers
    if not all(low < high for low, high in pairwise((0, *cuts, num_layers))):
        end = "" if known.spec is None else f" to {num_layers - 1}"
        yield _problem(known, path, f"must increase, from 1{end}", hint)


def _split_backward(known: Known) -> Iterator[Problem]:
    """Weight passes of their own need the weights as they are, long after the input pass."""
    plan, path = known.plan, "pipeline.schedule"
    if not _schedule(plan.pipeline.schedule).splits_backward:
        return
    if plan.zero_technique == "3":
        rule = "splits backward passes, of which torch's ZeRO stage 3 wants each in one piece"
        yield _problem(known, path, rule, f'set zero.sharder = "own", or use {_whole_schedules()}')
    if plan.train.compile == "on":
        rule = 'splits backward passes, which train.compile = "on" cannot'
        hint = f'set train.compile = "off", or use {_whole_schedules()}'
        yield _problem(known, path, rule, hint)


def _whole_schedules() -> str:
    """The schedules that do not split backward passes."""
    table = importlib.import_module("paceline.parallel.pipeline").SCHEDULES
    return ", ".join(name for name in table if not _schedule(name).splits_backward)


def _module_axes(known: Known) -> Iterator[Problem]:
    for axis in ("pp", "cp", "ep"):
        if getattr(known.plan.mesh, axis) > 1:
            rule = "is for models of this package: a module of one's own is not cut that way"
            yield _problem(known, f"mesh.{axis}", rule, "use mesh.tp, dp_shard, dp_replicate")
    if known.plan.zero_technique not in ("0", "3"):
        is_own = known.plan.zero_stage == 3
        path, hint = ("zero.sharder", "leave it out") if is_own else ("zero.stage", "use 0 or 3")
        rule = "is for models of this package: parallelize replicates, or shards by torch"
        yield _problem(known, path, rule, hint)


def _module_rows_are_whole(known: Known) -> Iterator[Problem]:
    if known.plan.mesh.tp > 1 and known.plan.tensor.sequence_parallel:
        path = "tensor.sequence_parallel"
        rule = "splits the residual stream, which a module of one's own keeps to itself"
        yield _problem(known, path, rule, "set it to false")


BASIC_RULES: tuple[Rule, ...] = (_signs, _betas, _not_built, _names)
RULES: tuple[Rule, ...] = (
    _ranks,
    _whole_batches,
    _zero_needs_shards,
    _sharder_fits,
    _one_float64,
    _context_fits,
    _tensor_fits,
    _peft_alone,
    _stages_per_rank,
    _whole_rounds,
    _stages_have_layers,
    _stage_cuts,
    _split_backward,
)
MODULE_RULES: tuple[Rule, ...] = (_module_axes, _module_rows_are_whole)
"""Rules for `paceline.parallelize` alone, whose module is not ours."""
