"""The runtime: every schedule gives the gradients of one process, bit by bit."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from stacks import B, D, Outcome, Rank, actions_of, losses_of, oracle, stack

from paceline.dist.collectives import Transfer
from paceline.dist.testing import run_ranks
from paceline.parallel.pipeline import SCHEDULES
from paceline.parallel.pipeline.base import Action, Kind
from paceline.parallel.pipeline.communicate import RECEIVES, SENDS
from paceline.parallel.pipeline.runtime import PURPOSES
from paceline.parallel.pipeline.timeline import peak_activations, timeline

pytestmark = pytest.mark.cpu

SPLIT = [name for name in SCHEDULES if SCHEDULES.load(name).splits_backward]


def num_stages(name: str, p: int) -> int:
    return p * SCHEDULES.load(name).min_stages_per_rank


def run_pipeline(
    name: str, p: int, m: int, dtype: torch.dtype = torch.float32, num_frozen: int = 0
) -> list[Outcome]:
    actions = actions_of(name, p, m)

    def work(rank: int) -> Outcome:
        stages = stack(num_stages(name, p), dtype, num_frozen=num_frozen)
        return Rank(rank, actions, stages, dtype).run()

    return run_ranks(work, p) if p > 1 else [work(0)]


def assert_same(outcomes: list[Outcome], expected: Outcome) -> None:
    """Every gradient and loss is found once, on one rank, bit by bit."""
    names = Counter(name for outcome in outcomes for name in outcome.gradients)
    assert names == Counter(expected.gradients.keys())
    for outcome in outcomes:
        for name, gradient in outcome.gradients.items():
            np.testing.assert_array_equal(gradient, expected.gradients[name], err_msg=name)
    assert [o.losses for o in outcomes if o.losses] == [expected.losses]


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_those_of_one_process(name, p, dtype):
    """Stages of 1, 2, 3, 1, ... layers; a number of micro-batches that is no multiple of p."""
    m = 2 * p if SCHEDULES.load(name).needs_rounds else 2 * p + 1
    expected = oracle(stack(num_stages(name, p), dtype), m, dtype)
    assert len(expected.gradients) == 4 * sum(1 + n % 3 for n in range(num_stages(name, p)))
    assert_same(run_pipeline(name, p, m, dtype), expected)


@pytest.mark.ranks
@pytest.mark.parametrize("name", [n for n in SCHEDULES if not SCHEDULES.load(n).needs_rounds])
def test_fewer_micro_batches_than_ranks(name):
    expected = oracle(stack(num_stages(name, 3), torch.float32), 1, torch.float32)
    assert_same(run_pipeline(name, 3, 1), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_runs_every_schedule_without_talking(name):
    (outcome,) = run_pipeline(name, 1, 4)
    assert_same([outcome], oracle(stack(num_stages(name, 1), torch.float32), 4, torch.float32))
    assert outcome.traffic == []
    assert all(action.kind not in (*SENDS, *RECEIVES) for action in outcome.trace)


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["one-f-one-b", "v-half"])
def test_a_frozen_first_stage_has_no_gradient_and_stops_nobody(name):
    stages = stack(num_stages(name, 2), torch.float32, num_frozen=1)
    expected = oracle(stages, 3, torch.float32)
    assert not any(parameter.startswith("0.") for parameter in expected.gradients)
    assert_same(run_pipeline(name, 2, 3, num_frozen=1), expected)


@pytest.mark.ranks
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_ran_is_what_the_schedule_says_with_its_bubble(name):
    """At unit costs the executed order takes the papers' time (test_pipeline_schedules)."""
    p, m = 4, 8
    outcomes = run_pipeline(name, p, m)
    executed = [outcome.trace for outcome in outcomes]
    assert executed == [list(own) for own in actions_of(name, p, m)]
    found = timeline(executed)
    bubble = {"zero-bubble": 3, "zero-bubble-v": 0, "v-half": 7}.get(name, 9)
    assert (found.inner_bubble if name == "zero-bubble-v" else found.bubble) == bubble
    for outcome in outcomes:
        backward = [a for a in outcome.trace if a.kind in ("B", "I", "W")]
        assert outcome.finished == backward


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["one-f-one-b", "zero-bubble-v"])
def test_traffic_is_one_activation_and_one_gradient_a_border_and_micro_batch(name):
    p, m = 3, 4
    outcomes = run_pipeline(name, p, m)
    num_borders = num_stages(name, p) - 1 - (name == "zero-bubble-v")
    for purpose in PURPOSES:
        for operation in ("send", "receive"):
            transfer = Transfer(operation, ("pp",), 4 * B * D, purpose)
            found = sum(outcome.traffic.count(transfer) for outcome in outcomes)
            assert found == m * num_borders
    assert sum(len(outcome.traffic) for outcome in outcomes) == 4 * m * num_borders


class _Token:
    """Dies with the graph that holds it."""


class _Held(torch.autograd.Function):
    """The input, and a token in the graph."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: _Token) -> torch.Tensor:
        ctx.token = token
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, None]:  # noqa: ARG004
        return grad_outputs[0], None


@pytest.mark.ranks
@pytest.mark.parametrize("name", SCHEDULES)
def test_as_many_activations_live_as_the_schedule_says(name):
    """An activation is a stage's graph, or what its weight pass is owed."""
    p, m = 2, 6
    actions = actions_of(name, p, m)

    def work(rank: int) -> tuple[int, int]:
        graphs: set[tuple[int, int]] = set()
        peaks: list[int] = []

        def watch(stage: int, microbatch: int, y: torch.Tensor) -> torch.Tensor:
            token = _Token()
            graphs.add((stage, microbatch))
            weakref.finalize(token, graphs.discard, (stage, microbatch))
            peaks.append(len(graphs | member.deferred._owed.keys()))
            return _Held.apply(y, token)

        stages = stack(num_stages(name, p), torch.float32)
        member = Rank(rank, actions, stages, torch.float32, watch)
        member.run()
        return max(peaks), len(graphs | member.deferred._owed.keys())

    expected = [(peak_activations(own), 0) for own in actions]
    assert run_ranks(work, p) == expected


@pytest.mark.ranks
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_evaluation_runs_forward_alone_and_leaves_nothing(name):
    p, m = 2, 4
    actions = actions_of(name, p, m, is_evaluation=True)
    with torch.no_grad():
        expected = list(losses_of(stack(num_stages(name, p), torch.float32), m, torch.float32))

    def work(rank: int) -> Outcome:
        stages = stack(num_stages(name, p), torch.float32)
        with torch.no_grad():
            return Rank(rank, actions, stages, torch.float32).run()

    outcomes = run_ranks(work, p)
    (losses,) = [o.losses for o in outcomes if o.losses]
    # Products of few rows are by another kernel where nothing is put off.
    assert losses == pytest.approx(dict(enumerate(map(float, expected))), rel=1e-6)
    for outcome in outcomes:
        assert outcome.gradients == {}
        assert outcome.finished == []


@pytest.mark.parametrize("name", SPLIT)
def test_a_step_after_a_step_adds_up(name):
    actions = actions_of(name, 1, 2)
    stages = stack(num_stages(name, 1), torch.float64)
    rank = Rank(0, actions, stages, torch.float64)
    first = {n: g.copy() for n, g in rank.run().gradients.items()}
    second = rank.run().gradients
    for name_of, gradient in first.items():
        np.testing.assert_allclose(second[name_of], 2 * gradient, rtol=1e-12)
    assert len(rank.runtime.trace) == len(actions[0])


def test_a_stage_that_ignores_its_input_is_an_error():
    weight = torch.ones(D, requires_grad=True)
    actions = actions_of("interleaved", 1, 1)
    rank = Rank(0, actions, stack(2, torch.float32), torch.float32)
    rank.watch = lambda stage, _microbatch, y: y if stage == 0 else y.detach() * weight
    with pytest.raises(AssertionError, match=r"B1\.0: the output does not depend on the input"):
        rank.run()


def test_actions_that_leave_something_are_an_error():
    forward = (tuple(a for a in actions_of("gpipe", 1, 1)[0] if a.kind is Kind.FORWARD),)
    rank = Rank(0, forward, stack(1, torch.float32), torch.float32)
    with pytest.raises(AssertionError, match=r"nobody has gone back through \[\(0, 0\)\]"):
        rank.run()


def test_the_trace_has_times_that_follow_each_other():
    rank = Rank(0, actions_of("v-half", 1, 3), stack(2, torch.float32), torch.float32)
    rank.run()
    spans = rank.runtime.trace
    assert spans[0].action == Action(Kind.FORWARD, 0, 0)
    times = [time for span in spans for time in (span.start, span.end)]
    assert times == sorted(times)
