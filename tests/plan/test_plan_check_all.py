"""Random plans: every problem at once, none that is not one, and hints that help.

What is illegal is written down here a second time, as plain conditions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.config import Config
from paceline.core.errors import Problem
from paceline.models.families.llama import PRESETS
from paceline.plan.check import RULES, check
from paceline.plan.model_spec import MoeSpec
from paceline.plan.plan import Plan
from paceline.plan.rules.known import Known, value_at

SPEC = replace(  # 6 query heads
    PRESETS["tiny"],
    num_layers=6,
    max_positions=64,
    moe=MoeSpec(num_experts=12, experts_per_token=4, d_expert=8, num_groups=4),
)
NUM_RANKS = 8

VALUES: dict[str, list[Any]] = {
    "mesh.pp": [1, 1, 2, 3, 7, 0],
    "mesh.dp_replicate": [1, 1, 2, -1],
    "mesh.dp_shard": [1, 1, 2, 4, 0],
    "mesh.cp": [1, 1, 1, 2, 7, 0],
    "mesh.tp": [1, 1, 2, 6, 7, 0],
    "mesh.ep": [1, 1, 1, 2, 3, 4, 0],
    "expert.balance_loss_weight": [0.0, 0.0, 0.1, -0.1],
    "zero.stage": [None, None, 0, 2, 3],
    "zero.sharder": ["auto", "auto", "auto", "own", "torch"],
    "tensor.sequence_parallel": [True, True, False],
    "pipeline.schedule": ["one-f-one-b", "gpipe", "interleaved", "zero-bubble", "v-half"],
    "pipeline.num_microbatches": [None, None, 1, 2, 4, 5, 0],
    "pipeline.stages_per_rank": [1, 1, 2, 3, 9, 0],
    "pipeline.stage_cuts": [None, None, None, (2,), (3, 3)],
    "pipeline.vocabulary": ["edges", "edges", "edges", "spread"],
    "pipeline.vocabulary_barriers": [1, 1, 1, 2],
    "context.method": ["zigzag-ring", "zigzag-ring", "ulysses", "ulysses-ring"],
    "context.ulysses_degree": [None, None, None, 1, 2, 7, 0],
    "memory.remat": ["none", "none", "full", "full-keep-attention"],
    "precision.params": ["float32", "float32", "float64"],
    "precision.compute": ["float32", "float32", "float64"],
    "precision.reduce": ["float32", "float32", "float64"],
    "train.sequence_length": [16, 16, 60, 65, 0],
    "train.tokens_per_step": [16 * 16, 16 * 60, 17, 0],
    "train.freeze": [(), (), ("blocks.0.*",)],
    "train.compile": ["auto", "auto", "on"],
    "train.seed": [0, 0, 0, -1],
    "peft.method": ["none", "none", "lora", "prompt", "none of ours"],
    "peft.rank": [8, 8, 8, 4, 0],
    "peft.virtual_tokens": [16, 16, 16, 3, 70],
    "optimizer.lr": [0.1, 0.1, 0.1, 0.0],
    "optimizer.betas": [(0.9, 0.95), (0.9, 0.95), (1.0, 0.5), ()],
    "resilience.on_failure": ["stop", "stop", "stop", "restart", "shrink"],
    "resilience.max_restarts": [0, 0, 0, 2, -1],
    "resilience.shrink_plans": [(), (), ("small.toml",)],
    "serve.mesh.tp": [1, 1, 1, 2, 7, 0],
}
SPLITS_BACKWARD = ("zero-bubble", "v-half")
AXES = ("mesh.pp", "mesh.dp_replicate", "mesh.dp_shard", "mesh.cp", "mesh.tp")


class Illegal(NamedTuple):
    """A condition that makes a plan illegal.

    Attributes:
        path: of the problem.
        keys: that the condition reads.
        holds: the condition, of the values of its keys.
    """

    path: str
    keys: tuple[str, ...]
    holds: Callable[..., bool]


def alone(path: str, holds: Callable[[Any], bool]) -> Illegal:
    return Illegal(path, (path,), holds)


def is_cut_wrongly(cuts: tuple[int, ...] | None, pp: int, per_rank: int) -> bool:
    return cuts is not None and (len(cuts) != pp * per_rank - 1 or len(set(cuts)) < len(cuts))


def divides_no_near_step(count: int | None, length: int, tokens: int, *of: Any) -> bool:
    unit = length * of[0] * of[1]
    near = {tokens // unit, -(-tokens // unit)} - {0}
    return count is not None and all(sequences % count for sequences in near)


def is_no_multiple(length: int, tokens: int, *ranks: int) -> bool:
    return tokens % (length * ranks[0] * ranks[1]) != 0


BASIC = (
    *(alone(path, lambda value: value <= 0) for path in AXES),
    alone("context.ulysses_degree", lambda value: value == 0),
    alone("mesh.ep", lambda value: value <= 0),
    alone("expert.balance_loss_weight", lambda value: value < 0),
    alone("pipeline.num_microbatches", lambda value: value == 0),
    alone("pipeline.stages_per_rank", lambda value: value <= 0),
    alone("train.sequence_length", lambda value: value <= 0),
    alone("train.tokens_per_step", lambda value: value <= 0),
    alone("train.seed", lambda value: value < 0),
    alone("peft.method", lambda value: value == "none of ours"),
    alone("peft.rank", lambda value: value <= 0),
    alone("optimizer.lr", lambda value: value <= 0),
    alone("optimizer.betas", lambda value: value != (0.9, 0.95)),
    alone("resilience.max_restarts", lambda value: value < 0),
    alone("serve.mesh.tp", lambda value: value <= 0),
)
STEP = ("train.sequence_length", "train.tokens_per_step", "mesh.dp_replicate", "mesh.dp_shard")
ULYSSES = ("ulysses", "ulysses-ring")
EXPERT_RANKS = ("mesh.ep", "mesh.dp_shard", "mesh.cp", "mesh.tp")
CONTEXT = ("mesh.cp", "context.method", "context.ulysses_degree")
ROUNDS = ("pipeline.num_microbatches", *STEP, "pipeline.schedule", "mesh.pp")
PRECISION = ("precision.params", "precision.compute", "precision.reduce")
WORDS = ("pipeline.vocabulary", "pipeline.vocabulary_barriers", "mesh.pp", "mesh.tp")
BETWEEN = (
    Illegal("mesh", AXES, lambda *d: math.prod(d) != NUM_RANKS),
    Illegal("train.tokens_per_step", STEP, is_no_multiple),
    Illegal("pipeline.num_microbatches", ROUNDS, divides_no_near_step),
    Illegal("zero.stage", ("zero.stage", "mesh.dp_shard"), lambda z, d: bool(z) and d == 1),
    Illegal("precision.params", PRECISION, lambda p, c, r: p == "float64" != min(c, r)),
    Illegal("precision.compute", PRECISION, lambda p, c, _: p != "float64" == c),
    Illegal("precision.reduce", PRECISION, lambda p, c, r: p != "float64" != c and r == "float64"),
    alone("mesh.tp", lambda tp: tp > 6),
    alone("serve.mesh.tp", lambda tp: tp > 6),
    Illegal(
        "tensor.sequence_parallel",
        ("tensor.sequence_parallel", "mesh.tp"),
        lambda is_split, tp: tp == 1 and not is_split,
    ),
    Illegal("context.method", ("mesh.cp", "context.method"), lambda c, m: c == 1 and m in ULYSSES),
    Illegal(
        "context.ulysses_degree",
        CONTEXT,
        lambda cp, method, d: (
            d is not None and (cp == 1 or method != "ulysses-ring" or cp % d != 0)
        ),
    ),
    Illegal(
        "context.ulysses_degree",
        (*CONTEXT, "mesh.tp"),
        lambda cp, method, d, tp: (
            cp > 1 and method == "ulysses-ring" and tp <= 6 and (d or 1) > 6 // tp
        ),
    ),
    Illegal(
        "mesh.cp",
        (*CONTEXT, "mesh.tp"),
        lambda cp, method, _, tp: cp > 1 and method == "ulysses" and tp <= 6 and cp > 6 // tp,
    ),
    Illegal(
        "memory.remat",
        ("mesh.cp", "memory.remat"),
        lambda cp, remat: cp == 1 and remat == "full-keep-attention",
    ),
    Illegal("mesh.pp", ("mesh.pp", "pipeline.stages_per_rank"), lambda pp, count: pp * count > 6),
    Illegal(
        "pipeline.stages_per_rank",
        ("pipeline.schedule", "pipeline.stages_per_rank"),
        lambda name, count: (
            count < 2 if name == "interleaved" else count != {"v-half": 2}.get(name, 1)
        ),
    ),
    Illegal(
        "pipeline.num_microbatches",
        ROUNDS,
        lambda count, *of: of[4] == "interleaved" and bool(count) and count % of[5] != 0,
    ),
    Illegal(
        "pipeline.stage_cuts",
        ("pipeline.stage_cuts", "mesh.pp", "pipeline.stages_per_rank"),
        is_cut_wrongly,
    ),
    Illegal(
        "pipeline.vocabulary", WORDS, lambda v, _, pp, tp: v == "spread" and (pp == 1 or tp > 1)
    ),
    Illegal("pipeline.vocabulary_barriers", WORDS, lambda v, n, *_: v == "edges" and n > 1),
    Illegal(
        "pipeline.schedule",
        ("pipeline.schedule", "zero.stage", "zero.sharder", "mesh.dp_shard", "mesh.pp"),
        lambda name, z, own, d, pp: (
            name in SPLITS_BACKWARD
            and (z == 3 or (z is None and d > 1))
            and (own == "torch" or (own == "auto" and pp == 1))
        ),
    ),
    Illegal(
        "zero.sharder",
        ("zero.stage", "zero.sharder", "mesh.dp_shard", "mesh.pp"),
        lambda z, own, d, pp: (
            own == "torch" and pp > 1 if z == 3 or (z is None and d > 1) else own != "auto"
        ),
    ),
    Illegal(
        "train.compile",
        ("train.compile", "mesh.pp", "mesh.cp", "mesh.tp", "mesh.ep", "pipeline.schedule"),
        lambda c, *d: c == "on" and (max(d[:4]) > 1 or d[4] in SPLITS_BACKWARD),
    ),
    Illegal(
        "peft.method",
        ("peft.method", "mesh.pp", "mesh.cp", "mesh.tp", "mesh.ep", "pipeline.schedule"),
        lambda m, *d: m != "none" and (max(d[:4]) > 1 or d[4] in SPLITS_BACKWARD),
    ),
    Illegal(
        "mesh.ep", EXPERT_RANKS, lambda ep, *of: of[0] * of[1] * of[2] % ep != 0 or 4 % ep != 0
    ),
    Illegal(
        "tensor.sequence_parallel",
        ("tensor.sequence_parallel", "mesh.tp", "mesh.ep"),
        lambda is_split, tp, ep: tp > 1 and ep > 1 and not is_split,
    ),
    Illegal(
        "expert.balance_loss_weight",
        ("expert.balance_loss_weight", "peft.method"),
        lambda weight, method: weight > 0 and method != "none",
    ),
    Illegal(
        "resilience.max_restarts",
        ("resilience.on_failure", "resilience.max_restarts"),
        lambda way, count: (way == "stop") != (count == 0),
    ),
    Illegal(
        "resilience.shrink_plans",
        ("resilience.on_failure", "resilience.shrink_plans"),
        lambda way, plans: way != "shrink" and plans != (),
    ),
    Illegal("train.freeze", ("train.freeze", "peft.method"), lambda f, m: f and m != "none"),
    Illegal("peft.rank", ("peft.rank", "peft.method"), lambda r, m: r != 8 and m != "lora"),
    Illegal(
        "train.sequence_length",
        ("train.sequence_length", "peft.method", "peft.virtual_tokens"),
        lambda length, m, virtual: length + virtual * (m == "prompt") > 64,
    ),
)
PLANS = st.fixed_dictionaries({path: st.sampled_from(values) for path, values in VALUES.items()})


def make(values: dict[str, Any]) -> Plan:
    data: dict[str, Any] = {}
    for path, value in values.items():
        *tables, key = path.split(".")
        table = data
        for name in tables:
            table = table.setdefault(name, {})
        if value is not None:
            table[key] = value
    return Plan.from_dict(data)


def those_that_hold(conditions: tuple[Illegal, ...], values: dict[str, Any]) -> set[str]:
    return {c.path for c in conditions if c.holds(*(values[key] for key in c.keys))}


@settings(max_examples=200, deadline=None)
@given(PLANS)
def test_every_problem_is_told_at_once(values):
    plan = make(values)
    found = {problem.path for problem in check(plan, SPEC, num_ranks=NUM_RANKS)}
    basic = those_that_hold(BASIC, values)
    judged = tuple(c for c in BETWEEN if not basic.intersection(c.keys))
    expected = basic | those_that_hold(judged, values)
    assert expected <= found
    if not basic:  # a step's own number of micro-batches may be no multiple, and virtual tokens
        rest = {"pipeline.num_microbatches", "peft.virtual_tokens"}
        assert found - rest <= expected


@settings(max_examples=60, deadline=None)
@given(PLANS)
def test_the_value_that_a_hint_names_mends_its_problem(values):
    plan = make(values)
    for problem in check(plan, SPEC, num_ranks=NUM_RANKS):
        assert problem.hint, problem
        for way in ways_out(problem):
            mended = plan.with_overrides(way)
            left = check(mended, SPEC, num_ranks=NUM_RANKS)
            assert kind(problem) not in map(kind, left), (problem, way)


def ways_out(problem: Problem) -> list[list[str]]:
    """The assignments that a hint proposes, one way a list."""
    set_to = re.findall(r"([a-z_]+\.[a-z_.]+) = (\d+)", problem.hint)
    if set_to:
        return [[f"{path}={value}"] for path, value in set_to]
    if both := re.fullmatch(r"use (\d+), and at most (\d+) for ([a-z_.]+)", problem.hint):
        return [[f"{problem.path}={both[1]}", f"{both[3]}={both[2]}"]]
    if said := re.match(r"use (?:at most )?(\[.*\]|[\d.]+(?:(?: or |, )[\d.]+)*)", problem.hint):
        values = [said[1]] if said[1].startswith("[") else re.split(r" or |, ", said[1])
        return [[f"{problem.path}={value.strip('. ')}"] for value in values if value]
    return []


def kind(problem: Problem) -> tuple[str, str]:
    """A problem but for the numbers in its rule."""
    return problem.path, re.sub(r"\d+", "n", problem.rule)


class Watched:
    """A config that notes which of its keys are read."""

    def __init__(self, config: Config, read: set[str], prefix: str = "") -> None:
        self._config, self._read, self._prefix = config, read, prefix

    def __getattr__(self, name: str) -> Any:
        if name not in {field.name for field in fields(self._config)}:
            return getattr(type(self._config), name).fget(self)  # a property, of keys
        value, path = getattr(self._config, name), self._prefix + name
        if isinstance(value, Config):
            return Watched(value, self._read, f"{path}.")
        self._read.add(path)
        return value


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.strip("_"))
def test_a_rule_reads_the_keys_that_stand_with_it(rule, monkeypatch):
    """On plans that it likes and on plans that it does not: exactly these, and no others."""
    read: set[str] = set()
    monkeypatch.setattr(Known, "problem", lambda _, path, *texts: Problem(path, "", *texts))
    found = 0
    for values in _plans_of(RULES[rule]):
        plan: Any = Watched(make(values), read)
        for spec in (SPEC, replace(SPEC, ladder_from=0)):
            found += len(list(rule(Known(plan, spec, NUM_RANKS))))
    assert found, "no plan here breaks the rule"
    assert read == set(RULES[rule])


def _plans_of(keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Default plans with sound values at some of the keys, one and two at a time; at all three."""
    sound = {"train.sequence_length": 16, "train.tokens_per_step": 96}
    more = {"train.microbatch_tokens": [16], "peft.targets": [("*.up",)]}
    more |= {"peft.alpha": [2.0], "peft.width": [3]}
    more |= {"serve.adapters": [{"mine": "folder"}], "serve.batch_invariant": [True]}
    more |= {"serve.mesh.pp": [1, 7], "serve.mesh.ep": [1]}
    more |= {"serve.weights": ["auto", "int8"], "serve.draft": ["none", "ngram"]}
    choices = [
        (key, value)
        for key in keys
        for value in (VALUES | more)[key]
        if not those_that_hold(tuple(c for c in BASIC if c.path == key), {key: value})
    ]
    others = choices if len(keys) == 3 else choices[:1]
    return [sound | dict([c, a, b]) for a in choices for b in choices for c in others]


def test_the_values_here_are_those_of_keys_that_there_are():
    assert all(
        value_at(Plan(), path) in values for path, values in VALUES.items() if len(values) > 9
    )
    assert {path for c in (*BASIC, *BETWEEN) for path in c.keys} <= set(VALUES)
