"""What of a plan may change as a run goes on, and what may not."""

from __future__ import annotations

from dataclasses import fields

import pytest

from paceline.core.errors import ConfigError
from paceline.plan.check import require_resumable
from paceline.plan.difference import leaves
from paceline.plan.plan import Plan
from paceline.plan.rules.resume import FIXED, MAY_CHANGE, fixed_keys_stay

PLAN = Plan()
CHANGES = (
    "train.sequence_length=64",
    "train.tokens_per_step=64",
    "train.seed=1",
    "train.pack=false",
    "train.long_documents=drop",
    "train.answers_only=false",
    'train.freeze=["blocks.0.*"]',
    "peft.method=lora",
    "peft.rank=3",
    "precision.params=float64",
    "replicas.method=other",
    "optimizer.name=sgd",
    "optimizer.betas=[0.5, 0.5]",
)
HARMLESS = (
    "mesh.tp=2",
    "zero.stage=1",
    "pipeline.num_microbatches=2",
    "memory.remat=full",
    "precision.compute=bfloat16",
    "train.microbatch_tokens=64",
    "train.eval_tokens=64",
    "optimizer.lr=1",
    "optimizer.schedule.kind=constant",
    "checkpoint.interval_steps=2",
    "resilience.patience=5",
)


def test_every_key_is_in_one_of_the_two_tables():
    """A key that is in neither is refused too, but nobody has thought about it."""
    for path in leaves(PLAN):
        above = {".".join(path.split(".")[: n + 1]) for n in range(len(path.split(".")))}
        assert len(above & {*MAY_CHANGE, *FIXED}) == 1, path
    known = set(leaves(PLAN)) | {field.name for field in fields(Plan)} | {"optimizer.schedule"}
    assert {*MAY_CHANGE, *FIXED} <= known


def test_how_a_run_is_done_may_change():
    assert list(fixed_keys_stay(PLAN, PLAN.with_overrides(HARMLESS))) == []
    require_resumable(PLAN, PLAN.with_overrides(HARMLESS))


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_stands_on_may_not(change):
    path, _, value = change.partition("=")
    (problem,) = fixed_keys_stay(PLAN, PLAN.with_overrides([change, *HARMLESS]))
    assert (problem.path, problem.value.strip('"')) == (path, value)
    assert problem.rule.startswith("decides w")
    assert problem.rule.endswith(" in this run")
    assert problem.hint.startswith("leave it at ")


def test_all_that_may_not_change_is_told_at_once_with_the_values_of_the_run():
    after = PLAN.with_overrides([*CHANGES, *HARMLESS])
    with pytest.raises(ConfigError, match=rf"{len(CHANGES)} problems in other\.toml") as caught:
        require_resumable(PLAN, after, source="other.toml")
    told = {problem.path: problem for problem in caught.value.problems}
    assert list(told) == sorted(told, key=list(leaves(PLAN)).index)
    assert told.keys() == {change.partition("=")[0] for change in CHANGES}
    rule = "decides which tokens a step reads, and is 512 in this run"
    assert told["train.sequence_length"].rule == rule
    assert told["train.sequence_length"].hint == (
        "leave it at 512, or begin a new run from an export: paceline checkpoint export"
    )
