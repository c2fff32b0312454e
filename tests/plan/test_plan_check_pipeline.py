"""What goes together in a pipeline: schedule, stages, ranks, micro-batches, layers, cuts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from paceline.models.families.llama import PRESETS
from paceline.parallel.pipeline import SCHEDULES
from paceline.plan.check import check
from paceline.plan.plan import Plan

SPEC = replace(PRESETS["tiny"], num_layers=6)
SPLIT = ("zero-bubble", "zero-bubble-v", "v-half")
V = {"interleaved": 2, "zero-bubble-v": 2, "v-half": 2}


def plan(pp: int, schedule: str = "one-f-one-b", sequences: int = 12, **others: Any) -> Plan:
    """A plan of `sequences` a step, 16 tokens each."""
    tables: dict[str, Any] = {
        "mesh": {"pp": pp},
        "pipeline": {"schedule": schedule, "stages_per_rank": V.get(schedule, 1)},
        "train": {"sequence_length": 16, "tokens_per_step": 16 * sequences},
    }
    for path, value in others.items():
        table, key = path.split("__")
        tables.setdefault(table, {})[key] = value
    return Plan.from_dict(tables)


def problems(plan: Plan, spec: Any = SPEC) -> list[tuple[str, str, str]]:
    return [(p.path, p.rule, p.hint) for p in check(plan, spec)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_every_schedule_goes_on_any_number_of_ranks(schedule, pp):
    for count in (None, 6, 12):
        others = {} if count is None else {"pipeline__num_microbatches": count}
        # Unless told, a rank takes as few micro-batches as hold its tokens.
        others |= {} if count else {"train__microbatch_tokens": 32}
        assert problems(plan(pp, schedule, **others)) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stages_of_a_rank_are_those_of_the_schedule(schedule):
    for count in (1, 2, 3):
        found = problems(
            plan(2, schedule, pipeline__stages_per_rank=count, pipeline__num_microbatches=6)
        )
        legal = {"interleaved": "2 or more"}.get(schedule, str(V.get(schedule, 1)))
        if str(count) == legal or (count >= 2 and schedule == "interleaved"):
            assert found == []
        else:
            rule = f"does not go with {schedule}, which takes {legal} a rank"
            assert found == [("pipeline.stages_per_rank", rule, f"use {legal}")]


@pytest.mark.parametrize("count", [0, -1])
def test_there_is_at_least_one_stage_a_rank(count):
    found = problems(plan(2, pipeline__stages_per_rank=count))
    assert found == [("pipeline.stages_per_rank", "must be positive and finite", "use 1 or more")]


@pytest.mark.parametrize(
    ("count", "sequences", "hint"),
    [
        (2, 12, "use 3"),
        (4, 12, "use 3 or 6"),
        (1, 12, "use 3"),
        (8, 24, "use 6 or 12"),
        (1, 8, "make train.tokens_per_step a multiple of 48"),
        (4, 8, "make train.tokens_per_step a multiple of 48"),
    ],
)
def test_interleaved_takes_rounds_of_as_many_micro_batches_as_ranks(count, sequences, hint):
    sizes = {"sequences": sequences, "pipeline__num_microbatches": count}
    rule = f"interleaved takes multiples of mesh.pp = 3, not {count}"
    found = problems(plan(3, "interleaved", **sizes))
    assert found == [("pipeline.num_microbatches", rule, hint)]
    for schedule in SCHEDULES:  # the others take any number
        if schedule != "interleaved":
            assert problems(plan(3, schedule, **sizes)) == []


def test_the_hint_is_legal_where_the_number_also_does_not_divide():
    found = problems(plan(3, "interleaved", pipeline__num_microbatches=5))
    assert [path for path, _, _ in found] == ["pipeline.num_microbatches"] * 2
    assert found[1][2] == "use 3 or 6"


def test_the_number_of_micro_batches_that_follows_is_checked_too():
    assert problems(plan(2, "interleaved", train__microbatch_tokens=16)) == []
    found = problems(plan(2, "interleaved"))  # one micro-batch holds all
    rule = "interleaved takes multiples of mesh.pp = 2, not 1"
    assert found == [("pipeline.num_microbatches", rule, "use 2")]


@pytest.mark.parametrize(
    ("pp", "schedule", "hint"),
    [(7, "gpipe", "use at most 6"), (4, "v-half", "use at most 3"), (6, "gpipe", "")],
)
def test_every_stage_has_a_layer(pp, schedule, hint):
    stages = pp * V.get(schedule, 1)
    rule = f"makes {stages} stages, but the model has 6 layer(s)"
    assert problems(plan(pp, schedule)) == ([("mesh.pp", rule, hint)] if hint else [])
    assert problems(plan(pp, schedule), None) == []  # nobody knows yet


def test_more_stages_on_a_rank_than_layers():
    found = problems(plan(1, "interleaved", pipeline__stages_per_rank=7))
    rule = "makes 7 stages, but the model has 6 layer(s)"
    assert found == [("mesh.pp", rule, "set pipeline.stages_per_rank = 6")]
    (found,) = problems(plan(7, "interleaved", pipeline__stages_per_rank=7, sequences=14))[1:]
    assert found[2] == "use 1, and at most 6 for pipeline.stages_per_rank"


@pytest.mark.parametrize(
    ("cuts", "rules"),
    [
        ([2, 4], []),
        ([1, 5], []),
        ([2], ["must have one cut less than there are stages, 2"]),
        ([1, 2, 3], ["must have one cut less than there are stages, 2"]),
        ([2, 2], ["must increase, from 1 to 5"]),
        ([4, 2], ["must increase, from 1 to 5"]),
        ([0, 2], ["must increase, from 1 to 5"]),
        ([2, 6], ["must increase, from 1 to 5"]),
        ([6], ["must have one cut less than there are stages, 2", "must increase, from 1 to 5"]),
    ],
)
def test_cuts_leave_every_stage_a_layer(cuts, rules):
    hint = "leave it out: stages of even cost"
    found = problems(plan(3, pipeline__stage_cuts=cuts))
    assert found == [("pipeline.stage_cuts", rule, hint) for rule in rules]


def test_cuts_without_a_model_are_checked_for_what_is_known():
    assert problems(plan(3, pipeline__stage_cuts=[2, 600]), None) == []
    found = problems(plan(3, pipeline__stage_cuts=[3, 3]), None)
    assert [rule for _, rule, _ in found] == ["must increase, from 1"]


def test_one_stage_has_no_cuts():
    assert problems(plan(1, pipeline__stage_cuts=[])) == []
    assert len(problems(plan(1, pipeline__stage_cuts=[3]))) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_split_backward_passes_need_weights_that_stay(schedule):
    is_split = schedule in SPLIT
    whole = "gpipe, one-f-one-b, interleaved"
    sizes = {"mesh__dp_shard": 2, "pipeline__num_microbatches": 6}
    for num_ranks, others, setting in (
        (1, {"zero__stage": 3}, 'zero.sharder = "own"'),
        (1, {}, 'zero.sharder = "own"'),
    ):
        found = problems(plan(num_ranks, schedule, **sizes, **others))
        assert len(found) == is_split
        for path, rule, hint in found:
            assert path == "pipeline.schedule"
            assert rule.startswith("splits backward passes, ")
            assert hint == f"set {setting}, or use {whole}"
    for zero in ({}, {"zero__stage": 0}, {"zero__stage": 2}, {"zero__sharder": "own"}):
        assert problems(plan(2, schedule, **sizes, **zero)) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pp", "tp"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("key", ["train__compile", "peft__method"])
def test_what_is_proved_on_whole_blocks_alone_is_refused_where_they_are_split(
    schedule, pp, tp, key
):
    value, out = {
        "train__compile": ("on", 'use "auto" or "off"'),
        "peft__method": ("lora", 'or peft.method = "none"'),
    }[key]
    ways = ["mesh.pp > 1"] * (pp > 1) + ["mesh.tp > 1"] * (tp > 1)
    ways += [f"{schedule}, which splits backward passes"] * (schedule in SPLIT)
    sizes = {"mesh__tp": tp, "pipeline__num_microbatches": 6}
    found = problems(plan(pp, schedule, **sizes, **{key: value}))
    path = key.replace("__", ".")
    assert [p[:2] for p in found] == [(path, f"has not been proved with {way}") for way in ways]
    assert all(hint.endswith(out) for _, _, hint in found)
    assert problems(plan(pp, schedule, **sizes)) == []


def test_words_are_spread_over_several_ranks_without_tensor_ranks():
    spread = {"pipeline__vocabulary": "spread"}
    assert problems(plan(2, **spread)) == []
    ((path, rule, hint),) = problems(plan(1, **spread))
    assert (path, rule) == (
        "pipeline.vocabulary",
        "spreads words over mesh.pp ranks, of which there is one",
    )
    assert hint == 'set mesh.pp = 2 or more, or use "edges"'
    ((path, rule, _),) = problems(plan(2, mesh__tp=2, **spread))
    assert (path, rule) == (
        "pipeline.vocabulary",
        "has not been proved with mesh.tp > 1, which splits words too",
    )
    ((path, rule, hint),) = problems(plan(3, **spread), replace(SPEC, vocab_size=2))
    assert (path, rule) == ("mesh.pp", "exceeds the model's 2 words, which are spread")
    assert hint == "use at most 2"
    ((path, rule, _),) = problems(plan(2, pipeline__vocabulary_barriers=2))
    assert path == "pipeline.vocabulary_barriers"
    assert rule == "is for words that are spread, and they are on the edge stages"
