"""The one place for rules between techniques: `check` returns every problem of a plan at once.

A rule is a function from what is known (the plan, and the model and the number of ranks where
there are any) to problems, each with the way out: the nearest values that are legal. Basic rules
are of one key; a rule between keys stands with those that it reads, and is left out where one of
them is wrong by itself. The rules stand in `paceline.plan.rules`; what is not built, in
`paceline.plan.rules.basic`: a plan that asks for it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.errors import ConfigError, Problem
from paceline.plan.mesh import AXES
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import Plan
from paceline.plan.rules.adapters import adapters_are_named, adapters_stay_whole
from paceline.plan.rules.basic import betas, levels, names, not_built, signs
from paceline.plan.rules.context import (
    context_has_ranks,
    core_is_kept,
    token_ring_pays,
    ulysses_divides,
    ulysses_has_heads,
)
from paceline.plan.rules.experts import (
    balance_has_experts,
    experts_fit,
    experts_have_own_tokens,
    experts_re_group,
)
from paceline.plan.rules.known import Known, Rule
from paceline.plan.rules.module import module_axes, module_loss_is_its_own, module_rows_are_whole
from paceline.plan.rules.pipeline import (
    split_backward,
    stage_cuts,
    stages_have_layers,
    stages_per_rank,
    vocabulary_spreads,
)
from paceline.plan.rules.restart import restarts_are_counted, shrink_plans_are_read
from paceline.plan.rules.resume import fixed_keys_stay
from paceline.plan.rules.serving import (
    proved_over_ranks,
    serving_stages_have_layers,
    serving_tensor_fits,
)
from paceline.plan.rules.sharding import (
    ladder_fits,
    sharder_fits,
    tensor_fits,
    tensor_has_ranks,
    zero_needs_shards,
)
from paceline.plan.rules.step import (
    context_fits,
    ranks,
    whole_microbatches,
    whole_rounds,
    whole_sequences,
)
from paceline.plan.rules.training import (
    PEFT_KEYS,
    compiled_whole,
    frozen_once,
    one_float64,
    peft_options,
    peft_whole,
)


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


def require_resumable(before: Plan, after: Plan, *, source: str = "") -> None:
    """Raises ConfigError if a run cannot go on under another plan, with every reason.

    Args:
        before: the run's plan.
        after: the other plan, which `check` looks at as at any other.
        source: where it comes from.
    """
    if problems := list(fixed_keys_stay(before, after)):
        raise ConfigError(problems, source=source)


def require_for_module(plan: Plan) -> None:
    """Raises ConfigError if a user's own module cannot be laid as a plan says."""
    known = Known(plan, None, None)
    problems = check(plan) or [problem for rule in MODULE_RULES for problem in rule(known)]
    if problems:
        raise ConfigError(problems, source="the plan")


BASIC_RULES: tuple[Rule, ...] = (signs, betas, levels, not_built, names, adapters_are_named)

_STEP = ("train.sequence_length", "train.tokens_per_step", "mesh.dp_replicate", "mesh.dp_shard")
_ZERO = ("zero.stage", "zero.sharder", "mesh.dp_shard", "mesh.pp")
_EXPERT_RANKS = ("mesh.ep", "mesh.dp_shard", "mesh.cp", "mesh.tp")
_STAGES = ("mesh.pp", "pipeline.stages_per_rank")
_SPLITS = ("mesh.pp", "mesh.cp", "mesh.tp", "mesh.ep", "pipeline.schedule")
_CONTEXT = ("mesh.cp", "context.method", "context.ulysses_degree")
_ROUNDS = (*_STEP, "pipeline.num_microbatches", "pipeline.schedule", "mesh.pp")

RULES: dict[Rule, tuple[str, ...]] = {
    ranks: tuple(f"mesh.{axis}" for axis in AXES),
    whole_sequences: _STEP,
    whole_microbatches: _ROUNDS,
    zero_needs_shards: ("zero.stage", "mesh.dp_shard"),
    sharder_fits: _ZERO,
    one_float64: ("precision.params", "precision.compute", "precision.reduce"),
    context_fits: ("train.sequence_length", "peft.method", "peft.virtual_tokens"),
    tensor_has_ranks: ("mesh.tp", "tensor.sequence_parallel"),
    tensor_fits: ("mesh.tp",),
    ladder_fits: ("mesh.pp", "mesh.tp", "tensor.sequence_parallel"),
    experts_re_group: _EXPERT_RANKS,
    experts_fit: _EXPERT_RANKS,
    experts_have_own_tokens: ("mesh.ep", "mesh.tp", "tensor.sequence_parallel"),
    balance_has_experts: ("expert.balance_loss_weight", "peft.method"),
    context_has_ranks: ("mesh.cp", "context.method"),
    ulysses_divides: _CONTEXT,
    ulysses_has_heads: (*_CONTEXT, "mesh.tp"),
    core_is_kept: ("mesh.cp", "memory.remat"),
    compiled_whole: ("train.compile", *_SPLITS),
    peft_whole: ("peft.method", *_SPLITS),
    frozen_once: ("peft.method", "train.freeze"),
    peft_options: ("peft.method", *(f"peft.{key}" for key in PEFT_KEYS)),
    stages_per_rank: ("pipeline.schedule", "pipeline.stages_per_rank"),
    whole_rounds: (*_ROUNDS, "train.microbatch_tokens"),
    stages_have_layers: _STAGES,
    stage_cuts: (*_STAGES, "pipeline.stage_cuts"),
    vocabulary_spreads: (
        "mesh.pp",
        "mesh.tp",
        "pipeline.vocabulary",
        "pipeline.vocabulary_barriers",
    ),
    split_backward: ("pipeline.schedule", *_ZERO),
    restarts_are_counted: ("resilience.on_failure", "resilience.max_restarts"),
    shrink_plans_are_read: ("resilience.on_failure", "resilience.shrink_plans"),
    serving_tensor_fits: ("serve.mesh.tp",),
    serving_stages_have_layers: ("serve.mesh.pp",),
    proved_over_ranks: (
        "serve.mesh.tp",
        "serve.mesh.pp",
        "serve.batch_invariant",
        "serve.weights",
        "serve.draft",
    ),
    adapters_stay_whole: (
        "serve.adapters",
        "serve.batch_invariant",
        *(f"serve.mesh.{axis}" for axis in ("tp", "pp", "ep")),
    ),
}
"""Rule between keys to the keys that it reads; it runs where each of these makes sense alone."""
WARNINGS: tuple[Rule, ...] = (token_ring_pays,)
"""Rules that a plan without problems may break: they say what that costs."""
MODULE_RULES: tuple[Rule, ...] = (module_axes, module_rows_are_whole, module_loss_is_its_own)
"""Rules for `paceline.parallelize` alone, whose module is not ours."""
