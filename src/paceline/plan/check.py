"""The one place for rules between techniques: `check` returns every problem of a plan at once.

A rule is a function from what is known (the plan, and the model and the number of ranks where
there are any) to problems, each with the way out: the nearest values that are legal. Basic rules
are of one key; a rule between keys stands with those that it reads, and is left out where one of
them is wrong by itself. What this version has not built is in `NOT_BUILT`; a plan that asks for it
is refused.
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
from paceline.plan.plan import ContextConfig, PeftConfig, Plan, PrecisionConfig
from paceline.plan.tensor_rules import head_share

NOT_BUILT: dict[str, tuple[object, ...]] = {
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
    "expert.dispatch": "paceline.parallel.expert:DISPATCHES",
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
    "expert.balance_loss_weight",
    "train.seed",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.schedule.warmup_steps",
    "optimizer.schedule.final_fraction",
    "checkpoint.keep",
)
OPTIONAL_COUNTS = (
    "pipeline.num_microbatches",
    "context.ulysses_degree",
    "checkpoint.interval_steps",
)


@dataclass(frozen=True, slots=True)
class Known:
    """What a rule may look at."""

    plan: Plan
    spec: ModelSpec | None
    num_ranks: int | None


Rule = Callable[[Known], Iterator[Problem]]


def check(
    plan: Plan,
    spec: ModelSpec | None = None,
    *,
    num_ranks: int | None = None,
    unread: Sequence[Problem] = (),
) -> list[Problem]:
    """Every problem of a plan, for a model and a number of ranks where they are given.

    Args:
        plan: to check.
        spec: of the model.
        num_ranks: that there are.
        unread: what did not parse, for which the plan has defaults; told with the rest.
    """
    known = Known(plan, spec, num_ranks)
    problems = [*unread, *(problem for rule in BASIC_RULES for problem in rule(known))]
    wrong = {problem.path for problem in problems}
    sound = [
        rule for rule, keys in RULES.items() if not any(_touches(keys, path) for path in wrong)
    ]
    return problems + [problem for rule in sound for problem in rule(known)]


def warnings(plan: Plan, spec: ModelSpec | None = None) -> list[Problem]:
    """What a plan without problems would do better otherwise, for a model where it is given."""
    known = Known(plan, spec, None)
    return [problem for rule in WARNINGS for problem in rule(known)]


def _touches(keys: Sequence[str], path: str) -> bool:
    """Whether one of the keys is at a path, or in the table there."""
    return any(key == path or key.startswith(f"{path}.") for key in keys)


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
            yield _problem(known, path, "must be positive and finite", _usual(path, "1 or more"))
    for path in NOT_NEGATIVE:
        if not 0 <= value_at(known.plan, path) < math.inf:
            yield _problem(known, path, "must be finite and not negative", "use 0 or more")
    for path in OPTIONAL_COUNTS:
        value = value_at(known.plan, path)
        if isinstance(value, int) and value <= 0:
            yield _problem(known, path, "must be positive", "use 1 or more")


def _usual(path: str, count: str) -> str:
    """What to use for a quantity: a number that counts, or else its default."""
    usual = value_at(Plan(), path)
    return f"use {count}" if isinstance(usual, int) else f"use {usual}, the default"


def _betas(known: Known) -> Iterator[Problem]:
    path = "optimizer.betas"
    betas = value_at(known.plan, path)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        hint = f"use {json.dumps(value_at(Plan(), path))}"
        yield _problem(known, path, "must be two numbers from 0 to below 1", hint)


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
    mesh, there = known.plan.mesh, known.num_ranks
    need = mesh.num_ranks
    if there is None or there == need:
        return
    degrees = " x ".join(f"{axis} {getattr(mesh, axis)}" for axis in AXES)
    rule = f"{degrees} needs {need} rank(s), but there are {there}"
    others = {axis: need // getattr(mesh, axis) for axis in AXES if f"mesh.{axis}" not in NOT_BUILT}
    fits = {axis: there // rest for axis, rest in others.items() if there % rest == 0}
    settings = [f"mesh.{axis} = {degree}" for axis, degree in fits.items()]
    change = f"set {' or '.join(settings)}" if settings else "change [mesh]"
    yield Problem("mesh", str(need), rule, f"start {need} rank(s), or {change}")


def _sequences(plan: Plan) -> list[int]:
    """Sequences of a data rank's step: one number, or the two nearest where it is not whole."""
    count = plan.train.tokens_per_step // _tokens_of_sequences(plan)
    return [n for n in ([count, count + 1] if _tokens_left_over(plan) else [count]) if n]


def _tokens_left_over(plan: Plan) -> int:
    """Tokens of a step that make no whole sequences on all data ranks."""
    return plan.train.tokens_per_step % _tokens_of_sequences(plan)


def _tokens_of_sequences(plan: Plan) -> int:
    """Tokens of one sequence on every data rank."""
    return plan.train.sequence_length * plan.mesh.num_data_ranks


def _whole_sequences(known: Known) -> Iterator[Problem]:
    unit = _tokens_of_sequences(known.plan)
    if _tokens_left_over(known.plan):
        near = " or ".join(str(n * unit) for n in _sequences(known.plan))
        rule = f"must be a multiple of sequence_length x data ranks = {unit}"
        yield _problem(known, "train.tokens_per_step", rule, f"use {near}")


def _whole_microbatches(known: Known) -> Iterator[Problem]:
    count, sequences = known.plan.pipeline.num_microbatches, _sequences(known.plan)
    if count is not None and all(number % count for number in sequences):
        numbers = " or ".join(map(str, sequences))
        rule = f"must divide the {numbers} sequences of a rank's step"
        near = _nearest(count, _microbatch_counts(known.plan) or _microbatch_counts(known.plan, 1))
        yield _problem(known, "pipeline.num_microbatches", rule, f"use {near}")


def _microbatch_counts(plan: Plan, unit: int | None = None) -> list[int]:
    """Numbers of micro-batches that divide the sequences of a step.

    Args:
        plan: whose step it is.
        unit: what they are to be a multiple of; by default the schedule's.
    """
    step: int = unit or _schedule(plan.pipeline.schedule).microbatch_unit(plan.mesh.pp)
    sequences = _sequences(plan)
    candidates = range(step, max(sequences) + 1, step)
    return [n for n in candidates if any(number % n == 0 for number in sequences)]


def _zero_needs_shards(known: Known) -> Iterator[Problem]:
    if known.plan.zero.stage and known.plan.mesh.dp_shard == 1:
        rule = "shares state over dp_shard ranks, of which there is one"
        yield _problem(
            known, "zero.stage", rule, "set mesh.dp_shard = 2 or more, or zero.stage = 0"
        )


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
    values = {field.name: getattr(precision, field.name) for field in fields(PrecisionConfig)}
    wide = [name for name, value in values.items() if value == "float64"]
    if wide and len(wide) < len(values):
        others = " and ".join(f"precision.{name}" for name in values if name not in wide)
        hint = f'use "float64" for {others} too, or "float32" for all'
        rule = "float64 is for params, compute and reduce alike"
        yield _problem(known, f"precision.{wide[0]}", rule, hint)


def _context_fits(known: Known) -> Iterator[Problem]:
    if known.spec is None:
        return
    virtual, limit = known.plan.peft.num_virtual_tokens, known.spec.max_positions
    if known.plan.train.sequence_length + virtual > limit:
        behind = f", behind {virtual} virtual tokens," if virtual else ""
        rule = f"exceeds{behind} the model's context of {limit} tokens"
        is_room = limit > virtual
        hint = f"use at most {limit - virtual}" if is_room else "use fewer peft.virtual_tokens"
        yield _problem(known, "train.sequence_length", rule, hint)


def _tensor_has_ranks(known: Known) -> Iterator[Problem]:
    if known.plan.mesh.tp == 1 and not known.plan.tensor.sequence_parallel:
        rule = "says how mesh.tp ranks share, which is 1"
        yield _problem(
            known, "tensor.sequence_parallel", rule, "set mesh.tp = 2 or more, or leave it out"
        )


def _tensor_fits(known: Known) -> Iterator[Problem]:
    """Every rank has something of each matrix that is split."""
    degree, spec = known.plan.mesh.tp, known.spec
    if degree == 1 or spec is None:
        return
    if spec.qk_norm == "all" and spec.norm == "layer":
        yield _problem(known, "mesh.tp", "cannot split a layer norm over all heads", "use 1")
        return
    sizes = {
        "query heads": spec.num_heads,
        "columns of the feed-forward": spec.d_ffn,
        "words of the vocabulary": spec.vocab_size,
    }
    if spec.moe is not None and spec.moe.d_shared:
        sizes["columns of what all tokens share"] = spec.moe.d_shared
    for what, most in sizes.items():
        if degree > most:
            rule, hint = f"exceeds the model's {most} {what}", f"use at most {min(sizes.values())}"
            yield _problem(known, "mesh.tp", rule, hint)


def _ladder_fits(known: Known) -> Iterator[Problem]:
    """Between a ladder's layers goes an output that is under way; in its sums, whole tokens."""
    plan, spec = known.plan, known.spec
    if spec is None or spec.ladder_from is None:
        return
    if plan.mesh.pp > 1:
        rule = "cuts a model whose ladder residual has an output under way between its layers"
        yield _problem(known, "mesh.pp", rule, "use 1; mesh.tp and mesh.dp_shard split it too")
    if plan.mesh.tp > 1 and plan.tensor.sequence_parallel:
        rule = "splits the tokens of a residual stream that is a ladder, whose sums are whole"
        yield _problem(known, "tensor.sequence_parallel", rule, "set it to false")
    if plan.mesh.tp > 1 and spec.moe is not None:
        rule = "has not been proved with experts in a ladder residual"
        yield _problem(known, "mesh.tp", rule, "use 1")


def _experts_re_group(known: Known) -> Iterator[Problem]:
    """Experts are shared out among the ranks that hold one state."""
    mesh, count = known.plan.mesh, _expert_ranks(known.plan)
    if count % mesh.ep:
        rule = f"must divide dp_shard x cp x tp = {count}, which it re-groups"
        near = _nearest(mesh.ep, _divisors(count))
        yield _problem(known, "mesh.ep", rule, f"use {near}")


def _experts_fit(known: Known) -> Iterator[Problem]:
    """Every rank holds as many experts, and has as many tokens for them where groups see to it."""
    degree, spec = known.plan.mesh.ep, known.spec
    if degree == 1 or spec is None:
        return
    if spec.moe is None:
        rule = f"shares out experts, of which a model of {spec.family} has none"
        yield _problem(known, "mesh.ep", rule, "use 1")
        return
    counts = {"experts": spec.moe.num_experts}
    if spec.moe.num_groups > 1:
        counts = {"groups of experts": spec.moe.num_groups, **counts}
    for what, count in counts.items():
        if count % degree:
            rule = f"must divide the model's {count} {what}, so that ranks have the same load"
            near = _nearest(
                degree, _divisors(math.gcd(*counts.values(), _expert_ranks(known.plan)))
            )
            yield _problem(known, "mesh.ep", rule, f"use {near}")
            return


def _expert_ranks(plan: Plan) -> int:
    """Ranks that `mesh.ep` re-groups."""
    return plan.mesh.dp_shard * plan.mesh.cp * plan.mesh.tp


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def _experts_have_own_tokens(known: Known) -> Iterator[Problem]:
    plan = known.plan
    if plan.mesh.ep > 1 and plan.mesh.tp > 1 and not plan.tensor.sequence_parallel:
        rule = "has tensor ranks hold the same tokens, all of which mesh.ep would send to experts"
        hint = "leave it out, or set mesh.ep = 1"
        yield _problem(known, "tensor.sequence_parallel", rule, hint)


def _balance_has_experts(known: Known) -> Iterator[Problem]:
    path, plan = "expert.balance_loss_weight", known.plan
    if not plan.expert.balance_loss_weight:
        return
    if known.spec is not None and known.spec.moe is None:
        rule = f"balances experts, of which a model of {known.spec.family} has none"
        yield _problem(known, path, rule, "leave it out")
    if plan.peft.method != "none":
        rule = f"has not been proved with peft.method = {plan.peft.method}"
        yield _problem(known, path, rule, 'leave it out, or set peft.method = "none"')


_NO_CONTEXT = "says how mesh.cp ranks share sequences, which is 1"


def _context_has_ranks(known: Known) -> Iterator[Problem]:
    path = "context.method"
    if known.plan.mesh.cp == 1 and known.plan.context.method != ContextConfig().method:
        yield _problem(known, path, _NO_CONTEXT, "set mesh.cp = 2 or more, or leave it out")


def _ulysses_divides(known: Known) -> Iterator[Problem]:
    """Ranks that exchange heads are a whole part of those that share sequences."""
    plan, path = known.plan, "context.ulysses_degree"
    degree, cp = plan.context.ulysses_degree, plan.mesh.cp
    if degree is None:
        return
    if cp == 1:
        yield _problem(known, path, _NO_CONTEXT, "leave it out, or set mesh.cp = 2 or more")
        return
    if plan.context.method != "ulysses-ring":
        rule = f"is not read by context.method = {plan.context.method}"
        yield _problem(known, path, rule, "it is for ulysses-ring")
    elif cp % degree:
        near = _nearest(degree, _divisors(cp))
        yield _problem(known, path, f"must divide mesh.cp = {cp}", f"use {near}")


def _ulysses_has_heads(known: Known) -> Iterator[Problem]:
    """Every rank that exchanges heads gets a query head."""
    plan, spec = known.plan, known.spec
    if spec is None or plan.mesh.cp == 1 or plan.mesh.tp > spec.num_heads:
        return
    num_heads, degree = spec.num_heads // plan.mesh.tp, plan.ulysses_degree
    if degree <= num_heads:
        return
    each = "the model" if plan.mesh.tp == 1 else "a tensor rank"
    is_mixed = plan.context.method == "ulysses-ring"
    path = "context.ulysses_degree" if is_mixed else "mesh.cp"
    legal = [n for n in range(1, num_heads + 1) if not is_mixed or plan.mesh.cp % n == 0]
    rule = f"has {degree} ranks exchange the {num_heads} query head(s) of {each}"
    other = "" if is_mixed else ', or context.method = "ulysses-ring" or "zigzag-ring"'
    yield _problem(known, path, rule, f"use {legal[-1]}{other}")


def _core_is_kept(known: Known) -> Iterator[Problem]:
    path = "memory.remat"
    if known.plan.memory.remat == "full-keep-attention" and known.plan.mesh.cp == 1:
        rule = "is for attention over mesh.cp ranks, which is 1"
        yield _problem(known, path, rule, 'use "full" or "selective", or set mesh.cp = 2 or more')


def _token_ring_pays(known: Known) -> Iterator[Problem]:
    """Bytes of the busiest link, by the formulas of `paceline.parallel.context`, per head size."""
    plan, spec, cp = known.plan, known.spec, known.plan.mesh.cp
    if plan.context.method != "token-ring" or spec is None or cp == 1:
        return
    if plan.mesh.tp > spec.num_heads:
        return
    heads = head_share(spec.num_heads, spec.num_kv_heads, plan.mesh.tp, 0)
    narrow = {"float64": 8, "bfloat16": 2}.get(plan.precision.compute, 4)
    wide = max(4, narrow)
    queries = len(heads.query) * spec.head_dim * narrow
    keys = len(heads.key if heads.is_grouped else heads.query) * spec.head_dim
    sums = len(heads.query) * wide
    ours = cp * queries + sums + (cp - 1) * (3 * queries + sums) + queries
    rings = 2 * (cp - 1) * keys * (2 * narrow + wide)
    if ours > rings:
        rule = (
            f"has the busiest link of {cp} ranks carry {ours / rings:.1f} times what ring would: "
            f"{len(heads.query)} query heads on {len(heads.key)} key head(s)"
        )
        yield _problem(known, "context.method", rule, 'use "zigzag-ring" or "ring"')


def _compiled_whole(known: Known) -> Iterator[Problem]:
    """Blocks are compiled where they are whole, and so are their backward passes."""
    if known.plan.train.compile == "on":
        for way in _ways_of_splitting(known.plan):
            rule = f"has not been proved with {way}"
            yield _problem(known, "train.compile", rule, 'use "auto" or "off"')


def _peft_whole(known: Known) -> Iterator[Problem]:
    """Fine-tuning is proved where blocks are whole, and so are their backward passes."""
    if known.plan.peft.method != "none":
        for way, instead in _ways_of_splitting(known.plan).items():
            hint = f'set {instead}, or peft.method = "none"'
            yield _problem(known, "peft.method", f"has not been proved with {way}", hint)


def _ways_of_splitting(plan: Plan) -> dict[str, str]:
    """How a plan splits blocks or backward passes: each way, and what does not."""
    axes = [axis for axis in ("pp", "cp", "tp", "ep") if getattr(plan.mesh, axis) > 1]
    ways = {f"mesh.{axis} > 1": f"mesh.{axis} = 1" for axis in axes}
    if _schedule(plan.pipeline.schedule).splits_backward:
        way = f"{plan.pipeline.schedule}, which splits backward passes"
        ways[way] = f"pipeline.schedule to {_whole_schedules()}"
    return ways


def _frozen_once(known: Known) -> Iterator[Problem]:
    """Fine-tuning freezes the model itself."""
    method = known.plan.peft.method
    if method != "none" and known.plan.train.freeze:
        rule = f"does not go with peft.method = {method}, which freezes the whole model"
        yield _problem(known, "train.freeze", rule, "leave it out; peft.targets chooses layers")


def _peft_options(known: Known) -> Iterator[Problem]:
    """Options of fine-tuning belong to methods."""
    peft, unset = known.plan.peft, PeftConfig()
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
    count = plan.pipeline.num_microbatches
    if count is None and not _tokens_left_over(plan):
        count = batch_shape(plan).num_microbatches
    if count is not None and count % unit:
        rule = f"{plan.pipeline.schedule} takes multiples of mesh.pp = {unit}, not {count}"
        legal = _microbatch_counts(plan)
        other = f"make train.tokens_per_step a multiple of {unit * _tokens_of_sequences(plan)}"
        hint = f"use {_nearest(count, legal)}" if legal else other
        yield _problem(known, "pipeline.num_microbatches", rule, hint)


def _nearest(value: int, legal: Sequence[int]) -> str:
    """The legal values on both sides of one, as text."""
    below = [n for n in legal if n < value][-1:]
    return " or ".join(map(str, below + [n for n in legal if n > value][:1]))


def _stages_have_layers(known: Known) -> Iterator[Problem]:
    pp, per_rank = known.plan.mesh.pp, known.plan.pipeline.stages_per_rank
    if known.spec is None or pp * per_rank <= known.spec.num_layers:
        return
    num_layers = known.spec.num_layers
    rule = f"makes {pp * per_rank} stages, but the model has {num_layers} layer(s)"
    if per_rank <= num_layers:
        hint = f"use at most {num_layers // per_rank}"
    elif pp <= num_layers:
        hint = f"set pipeline.stages_per_rank = {num_layers // pp}"
    else:
        hint = f"use 1, and at most {num_layers} for pipeline.stages_per_rank"
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


def _vocabulary_spreads(known: Known) -> Iterator[Problem]:
    """Words are spread over the ranks of a pipeline, each of which has some of them."""
    pipeline, mesh, path = known.plan.pipeline, known.plan.mesh, "pipeline.vocabulary"
    if pipeline.vocabulary == "edges":
        if pipeline.vocabulary_barriers != 1:
            rule = "is for words that are spread, and they are on the edge stages"
            hint = 'leave it out, or set pipeline.vocabulary = "spread"'
            yield _problem(known, "pipeline.vocabulary_barriers", rule, hint)
        return
    if mesh.pp == 1:
        rule = "spreads words over mesh.pp ranks, of which there is one"
        yield _problem(known, path, rule, 'set mesh.pp = 2 or more, or use "edges"')
    if mesh.tp > 1:
        rule = "has not been proved with mesh.tp > 1, which splits words too"
        yield _problem(known, path, rule, 'set mesh.tp = 1, or use "edges"')
    if known.spec is not None and mesh.pp > known.spec.vocab_size:
        rule = f"exceeds the model's {known.spec.vocab_size} words, which are spread"
        yield _problem(known, "mesh.pp", rule, f"use at most {known.spec.vocab_size}")


def _split_backward(known: Known) -> Iterator[Problem]:
    """Weight passes of their own need the weights as they are, long after the input pass."""
    plan, path = known.plan, "pipeline.schedule"
    if not _schedule(plan.pipeline.schedule).splits_backward:
        return
    if plan.zero_technique == "3":
        rule = "splits backward passes, of which torch's ZeRO stage 3 wants each in one piece"
        yield _problem(known, path, rule, f'set zero.sharder = "own", or use {_whole_schedules()}')


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


def _module_loss_is_its_own(known: Known) -> Iterator[Problem]:
    if known.plan.expert.balance_loss_weight:
        rule = "is for models of this package: a module of one's own adds its losses itself"
        yield _problem(known, "expert.balance_loss_weight", rule, "leave it out")


def _module_rows_are_whole(known: Known) -> Iterator[Problem]:
    if known.plan.mesh.tp > 1 and known.plan.tensor.sequence_parallel:
        path = "tensor.sequence_parallel"
        rule = "splits the residual stream, which a module of one's own keeps to itself"
        yield _problem(known, path, rule, "set it to false")


BASIC_RULES: tuple[Rule, ...] = (_signs, _betas, _not_built, _names)

_STEP = ("train.sequence_length", "train.tokens_per_step", "mesh.dp_replicate", "mesh.dp_shard")
_ZERO = ("zero.stage", "zero.sharder", "mesh.dp_shard", "mesh.pp")
_EXPERT_RANKS = ("mesh.ep", "mesh.dp_shard", "mesh.cp", "mesh.tp")
_STAGES = ("mesh.pp", "pipeline.stages_per_rank")
_SPLITS = ("mesh.pp", "mesh.cp", "mesh.tp", "mesh.ep", "pipeline.schedule")
_CONTEXT = ("mesh.cp", "context.method", "context.ulysses_degree")
_ROUNDS = (*_STEP, "pipeline.num_microbatches", "pipeline.schedule", "mesh.pp")

RULES: dict[Rule, tuple[str, ...]] = {
    _ranks: tuple(f"mesh.{axis}" for axis in AXES),
    _whole_sequences: _STEP,
    _whole_microbatches: _ROUNDS,
    _zero_needs_shards: ("zero.stage", "mesh.dp_shard"),
    _sharder_fits: _ZERO,
    _one_float64: ("precision.params", "precision.compute", "precision.reduce"),
    _context_fits: ("train.sequence_length", "peft.method", "peft.virtual_tokens"),
    _tensor_has_ranks: ("mesh.tp", "tensor.sequence_parallel"),
    _tensor_fits: ("mesh.tp",),
    _ladder_fits: ("mesh.pp", "mesh.tp", "tensor.sequence_parallel"),
    _experts_re_group: _EXPERT_RANKS,
    _experts_fit: _EXPERT_RANKS,
    _experts_have_own_tokens: ("mesh.ep", "mesh.tp", "tensor.sequence_parallel"),
    _balance_has_experts: ("expert.balance_loss_weight", "peft.method"),
    _context_has_ranks: ("mesh.cp", "context.method"),
    _ulysses_divides: _CONTEXT,
    _ulysses_has_heads: (*_CONTEXT, "mesh.tp"),
    _core_is_kept: ("mesh.cp", "memory.remat"),
    _compiled_whole: ("train.compile", *_SPLITS),
    _peft_whole: ("peft.method", *_SPLITS),
    _frozen_once: ("peft.method", "train.freeze"),
    _peft_options: ("peft.method", *(f"peft.{key}" for key in PEFT_KEYS)),
    _stages_per_rank: ("pipeline.schedule", "pipeline.stages_per_rank"),
    _whole_rounds: (*_ROUNDS, "train.microbatch_tokens"),
    _stages_have_layers: _STAGES,
    _stage_cuts: (*_STAGES, "pipeline.stage_cuts"),
    _vocabulary_spreads: (
        "mesh.pp",
        "mesh.tp",
        "pipeline.vocabulary",
        "pipeline.vocabulary_barriers",
    ),
    _split_backward: ("pipeline.schedule", *_ZERO),
}
"""Rule between keys to the keys that it reads; it runs where each of these makes sense alone."""
WARNINGS: tuple[Rule, ...] = (_token_ring_pays,)
"""Rules that a plan without problems may break: they say what that costs."""
MODULE_RULES: tuple[Rule, ...] = (_module_axes, _module_rows_are_whole, _module_loss_is_its_own)
"""Rules for `paceline.parallelize` alone, whose module is not ours."""
