"""Serving policies, the whole table: what each promises of every step that it plans."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget, RequestView, StepPlan, View

BLOCK_SIZE = 4
BUDGETS = st.builds(Budget, st.integers(1, 20), st.integers(1, 4))


def blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


@st.composite
def requests(draw, number: int, *, runs: bool) -> RequestView:
    """One that has come so far as an engine's can."""
    num_prompt = draw(st.integers(1, 30))
    max_total = num_prompt + draw(st.integers(1, 20))
    num_total = draw(st.integers(num_prompt, max_total - 1))
    if runs:
        num_computed = draw(st.integers(0, num_total - 1))
        held = blocks(num_computed)
    else:
        held = draw(st.integers(0, (num_total - 1) // BLOCK_SIZE))
        num_computed = held * BLOCK_SIZE
    freed = draw(st.integers(1 if runs and held else 0, held))
    return RequestView(
        number, float(number), num_prompt, num_computed, num_total, max_total, held, freed
    )


@st.composite
def views(draw, most_running: int = 4) -> View:
    num_running, num_waiting = draw(st.integers(0, most_running)), draw(st.integers(0, 4))
    running = [draw(requests(number, runs=True)) for number in range(num_running)]
    waiting = [draw(requests(10 + number, runs=False)) for number in range(num_waiting)]
    for place, request in enumerate(waiting):
        others = [other.id for other in [*running, *waiting[:place]]]
        waiting[place] = replace(request, follows=draw(st.sampled_from([None, *others])))
    unheld = max((r.num_freed for r in waiting), default=0)
    num_free = unheld + draw(st.integers(0, 40))
    largest = max((blocks(r.max_total) for r in [*running, *waiting]), default=0)
    if not running:  # nothing is held, and the blocks hold each request alone
        num_free = max(num_free, largest)
    return View(running, waiting, num_free, BLOCK_SIZE)


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None, max_examples=300, database=None, report_multiple_bugs=False)
@given(views(), BUDGETS, st.floats(9, 99))
def test_every_step_keeps_the_contract(name, view, budget, now_s):
    policy = POLICIES.load(name)
    budget = replace(budget, max_sequences=max(budget.max_sequences, len(view.running)))
    before = copy.deepcopy(view)
    plan = policy(view, budget, now_s)
    assert view == before
    assert policy(view, budget, now_s) == plan
    running = {request.id: request for request in view.running}
    known = running | {request.id: request for request in view.waiting}
    assert len({share.request_id for share in plan.shares}) == len(plan.shares)
    assert set(plan.preempted) <= running.keys()
    assert not set(plan.preempted) & {share.request_id for share in plan.shares}
    num_free = view.num_free + sum(running[number].num_freed for number in plan.preempted)
    for share in plan.shares:
        request = known[share.request_id]
        assert 1 <= share.num_tokens <= request.num_left
        num_free -= max(0, blocks(request.num_computed + share.num_tokens) - request.num_blocks)
        num_free -= 0 if share.request_id in running else request.num_freed
    assert num_free >= 0
    assert sum(share.num_tokens for share in plan.shares) <= budget.max_batch_tokens
    admitted = {share.request_id for share in plan.shares} - running.keys()
    assert len(running) - len(plan.preempted) + len(admitted) <= budget.max_sequences
    if known and not plan.preempted:
        assert plan.shares
    if name != "static":  # whose batch is admitted at once
        followed = {request.follows for request in view.waiting if request.id in admitted}
        assert not followed & (running.keys() | admitted), "computed twice"


class Blocks:
    """Requests over a pool of their own, without sharing, as an engine keeps them."""

    def __init__(self, asked: list[RequestView], num_blocks: int) -> None:
        self.waiting, self.running = list(asked), []
        self.num_blocks = num_blocks

    def view(self) -> View:
        num_free = self.num_blocks - sum(request.num_blocks for request in self.running)
        return View(self.running, self.waiting, num_free, BLOCK_SIZE)

    def apply(self, plan: StepPlan) -> None:
        for number in plan.preempted:
            (victim,) = [request for request in self.running if request.id == number]
            self.running.remove(victim)
            self.waiting.insert(0, replace(victim, num_computed=0, num_blocks=0, num_freed=0))
        for share in plan.shares:
            for request in [r for r in self.waiting if r.id == share.request_id]:
                self.waiting.remove(request)
                self.running.append(request)
            place = [request.id for request in self.running].index(share.request_id)
            request = self.running[place]
            done = request.num_computed + share.num_tokens
            held = blocks(done)
            total = request.num_total + (done == request.num_total)
            self.running[place] = replace(
                request, num_computed=done, num_total=total, num_blocks=held, num_freed=held
            )
        self.running = [r for r in self.running if r.num_total < r.max_total]


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(st.lists(requests(0, runs=False), min_size=1, max_size=6), BUDGETS, st.integers(0, 20))
def test_every_request_ends(name, drawn, budget, spare):
    policy = POLICIES.load(name)
    asked = [
        replace(request, id=number, num_computed=0, num_blocks=0, num_freed=0)
        for number, request in enumerate(drawn)
    ]
    blocks_of_one = max(blocks(request.max_total) for request in asked)
    state = Blocks(asked, blocks_of_one + spare)
    num_steps = 0
    while state.waiting or state.running:
        plan = policy(state.view(), budget, 99.0)
        assert plan.shares or plan.preempted
        state.apply(plan)
        num_steps += 1
        assert num_steps < 50 * sum(request.max_total for request in asked)
