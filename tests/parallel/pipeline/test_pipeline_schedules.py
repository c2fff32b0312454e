"""Every pipeline schedule: it can run, and it has the bubble and the activations that papers say.

A stage's forward, input and weight passes each take 1, a whole backward pass 2.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.errors import UnknownNameError
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Action, Costs, Kind, Schedule, forward_only
from paceline.parallel.pipeline.communicate import add_transfers, check
from paceline.parallel.pipeline.timeline import peak_activations, timeline
from paceline.parallel.pipeline.weight_passes import place_weight_passes
from paceline.plan.plan import PipelineConfig

NUM_RANKS = range(1, 9)


def schedule_of(name: str) -> Schedule:
    return SCHEDULES.load(name)


def sizes_of(name: str) -> Iterator[tuple[int, int, int]]:
    """Ranks, stages of each, and micro-batches: few, about as many as ranks, and many."""
    schedule = schedule_of(name)
    for p in NUM_RANKS:
        for v in range(schedule.min_stages_per_rank, (schedule.max_stages_per_rank or 3) + 1):
            counts = {1, 2, 3, p - 1, p, p + 1, 2 * p - 2, 2 * p - 1, 2 * p, 3 * p, 4 * p + 1}
            unit = schedule.microbatch_unit(p)
            for m in sorted({-(-count // unit) * unit for count in counts if count}):
                yield p, v, m


def expected_bubble(name: str, p: int, m: int) -> float | None:
    """The papers' bubbles in passes of one stage; None where they have no formula."""
    match name:
        case "gpipe" | "one-f-one-b" | "interleaved":
            return 3 * (p - 1)  # (p - 1)(t_F + t_B) of a stage
        case "zero-bubble":
            return p - 1 if m >= p else None  # (p - 1)(t_F + t_B - t_W)
        case "zero-bubble-v":
            return 0 if m >= 2 * p - 1 else None
        case "v-half":  # about half of 1F1B's, whose passes are those of two stages
            less = 2 if p % 2 == 0 and p > 2 else p > 1
            return 6 * (p - 1) / 2 - less if m >= p else None
    raise AssertionError(name)


def expected_peaks(name: str, p: int, v: int, m: int) -> list[int]:
    """The papers' upper bounds on activations of each rank, in stages; all are reached."""
    match name:
        case "gpipe":
            return [m] * p
        case "one-f-one-b":
            return [min(m, p - rank) for rank in range(p)]
        case "interleaved":  # of rank 0: pv + p - 1, Korthikanti et al.'s 1 + (p - 1) / pv of pv
            return [min(m * v, (v - 1) * p + 2 * (p - 1 - rank) + 1) for rank in range(p)]
        case "zero-bubble":
            return [min(m, p)] * p
        case "zero-bubble-v":
            return [min(2 * m, 2 * p)] * p
        case "v-half":
            return [min(2 * m, (p + 2) // 2 * 2)] * p
    raise AssertionError(name)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ranks_can_run_it_with_transfers(name):
    for p, v, m in sizes_of(name):
        check(add_transfers(schedule_of(name).actions(p, v, m)), m)


@pytest.mark.parametrize("name", SCHEDULES)
def test_traits_say_which_stages_and_passes_a_rank_has(name):
    schedule = schedule_of(name)
    backward = {Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT}
    kinds = {Kind.FORWARD, *(backward if schedule.splits_backward else {Kind.BACKWARD})}
    for p, v, m in sizes_of(name):
        actions = schedule.actions(p, v, m)
        assert len(actions) == p
        for rank, own in enumerate(actions):
            assert {action.stage for action in own} == set(schedule.stages_of(rank, p, v))
            assert {action.kind for action in own} == kinds


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_added_in_the_order_of_micro_batches(name):
    """So every schedule adds up what plain accumulation does, in the same order."""
    for p, v, m in sizes_of(name):
        for own in schedule_of(name).actions(p, v, m):
            seen: dict[tuple[Kind, int], list[int]] = {}
            for kind, stage, microbatch in own:
                seen.setdefault((kind, stage), []).append(microbatch)
            assert all(order == list(range(m)) for order in seen.values())


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bubble_is_the_papers(name):
    num_formulas = 0
    for p, v, m in sizes_of(name):
        found = timeline(schedule_of(name).actions(p, v, m))
        expected = expected_bubble(name, p, m)
        if expected is not None:
            bubble = found.inner_bubble if name == "zero-bubble-v" else found.bubble
            assert bubble == expected, (p, v, m)
            num_formulas += 1
    assert num_formulas > 30


def test_zero_bubble_v_ends_as_it_began():
    """The bubble of the whole is what ranks begin apart."""
    for p in NUM_RANKS:
        found = timeline(schedule_of("zero-bubble-v").actions(p, 2, 2 * p))
        assert [own[0].start for own in found.spans] == list(range(p))
        assert found.bubble == p - 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_activations_are_the_papers(name):
    for p, v, m in sizes_of(name):
        peaks = [peak_activations(own) for own in schedule_of(name).actions(p, v, m)]
        expected = expected_peaks(name, p, v, m)
        if schedule_of(name).splits_backward:  # a bound of every rank that the fullest reaches
            assert max(peaks) == max(expected), (p, v, m)
            assert all(map(int.__le__, peaks, expected)), (p, v, m)
        else:
            assert peaks == expected, (p, v, m)


@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1.25, 0.75), (2, 3, 1)])
@pytest.mark.parametrize("name", ["gpipe", "one-f-one-b", "interleaved", "zero-bubble"])
def test_the_bubble_is_the_papers_where_passes_cost_differently(name, costs):
    forward, inputs, weights = costs
    unit = forward + inputs + (-weights if name == "zero-bubble" else weights)
    for p, v, m in sizes_of(name):
        if m >= p:
            passes = Costs(*costs)
            found = timeline(schedule_of(name).actions(p, v, m, passes), passes)
            assert found.bubble == (p - 1) * unit, (p, v, m)


@pytest.mark.parametrize("costs", [(1, 1, 1), (1, 1, 0.5), (1, 1.25, 0.75), (1, 1, 1.5), (1, 1, 2)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_more_micro_batches_make_no_more_bubble(name, costs):
    for p in NUM_RANKS:
        schedule, passes = schedule_of(name), Costs(*costs)
        v = schedule.min_stages_per_rank
        few, many = (timeline(schedule.actions(p, v, n * p, passes), passes) for n in (3, 6))
        assert few.bubble == many.bubble


def test_one_rank_has_no_bubble():
    for name in SCHEDULES:
        schedule = schedule_of(name)
        assert timeline(schedule.actions(1, schedule.min_stages_per_rank, 5)).bubble == 0


def test_more_stages_a_rank_make_less_bubble():
    """In time: a stage of v on a rank takes 1 / v of its layers."""
    for v in (2, 3, 4):
        costs = Costs(1 / v, 1 / v, 1 / v)
        found = timeline(schedule_of("interleaved").actions(4, v, 8, costs), costs)
        assert found.bubble == pytest.approx(3 * 3 / v)


costs = st.floats(0.5, 2.0)


@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 6), st.integers(1, 9), costs, costs, costs)
@settings(max_examples=150, deadline=None)
def test_any_costs_keep_it_sound_and_within_its_activations(name, p, rounds, forward, inputs, w):
    schedule, passes = schedule_of(name), Costs(forward, inputs, w)
    v, m = schedule.min_stages_per_rank, rounds * schedule.microbatch_unit(p)
    actions = schedule.actions(p, v, m, passes)
    check(add_transfers(actions), m)
    assert max(map(peak_activations, actions)) <= max(expected_peaks(name, p, v, m))
    found = timeline(actions, passes, transfer=0.1)
    work = v * m * (forward + inputs + w)
    for own in found.spans:
        assert sum(span.end - span.start for span in own) == pytest.approx(work)
        assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    # No schedule beats a rank's own work, or the first micro-batch's way through and back.
    assert found.duration >= work - 1e-9
    assert found.duration >= p * v * (forward + inputs) + 2 * (p - 1) * 0.1 - 1e-9


def test_weight_passes_follow_the_costs():
    """Where they cost little, gaps are filled with more of them."""
    cheap, dear = (
        schedule_of("zero-bubble").actions(4, 1, 8, Costs(1, 1, weight)) for weight in (0.25, 4)
    )
    assert cheap != dear
    cheap_costs = Costs(1, 1, 0.25)
    assert timeline(cheap, cheap_costs).bubble <= timeline(dear, cheap_costs).bubble


def test_a_limit_that_cannot_hold_is_refused():
    order = ((Action(Kind.FORWARD, 0, 0), Action(Kind.FORWARD, 0, 1)),)
    with pytest.raises(ValueError, match=r"rank 0 holds more than 1 at F0\.1"):
        place_weight_passes(order, 1, Costs())


def test_an_order_that_waits_for_itself_is_refused():
    order = ((Action(Kind.BACKWARD_INPUT, 0, 0), Action(Kind.FORWARD, 0, 0)),)
    with pytest.raises(ValueError, match=r"waits for F0\.0, which never runs"):
        place_weight_passes(order, 1, Costs())
    with pytest.raises(ValueError, match=r"for ever, at \[I0\.0\]"):
        timeline(order)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_passes_alone_can_run_and_leave_no_more_bubble_than_the_way_through(name):
    for p, v, m in sizes_of(name):
        actions = forward_only(schedule_of(name).actions(p, v, m))
        assert {(a.stage, a.microbatch) for own in actions for a in own} == {
            (stage, microbatch) for stage in range(p * v) for microbatch in range(m)
        }
        found = timeline(actions)
        if v == 1:
            assert found.duration == m + p - 1
        assert found.duration <= v * m + 2 * p * v
        add_transfers(actions)


def test_actions_read_well():
    assert repr(Action(Kind.FORWARD, 3, 0)) == "F3.0"
    assert str([Action(Kind.RECEIVE_BACKWARD, 0, 12)]) == "[RB0.12]"


def test_sizes_that_do_not_go_are_an_error():
    with pytest.raises(AssertionError, match="stages_per_rank"):
        schedule_of("gpipe").actions(2, 2, 2)
    with pytest.raises(AssertionError, match="whole rounds"):
        schedule_of("interleaved").actions(2, 2, 3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_docstring_says_where_it_comes_from_and_what_it_costs(name):
    text = inspect.getdoc(importlib.import_module(SCHEDULES[name].split(":")[0])) or ""
    for heading in ("Source: ", "arXiv:", "Replaces: ", "Needs: ", "Forbids: ", "Cost: bubble "):
        assert heading in text or heading.replace("bubble", "no bubble") in text
    assert "Differs: " in text


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UnknownNameError, match="unknown pipeline schedule 'zero'") as caught:
        SCHEDULES.load("zero")
    assert "zero-bubble" in caught.value.hint


def test_the_plan_and_the_table_have_the_same_names():
    hints: dict[str, Any] = get_type_hints(PipelineConfig)
    assert set(get_args(hints["schedule"])) == set(SCHEDULES)
