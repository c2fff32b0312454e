"""Serving policies, the whole table: what each promises of every step that it plans."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget, RequestView, StepPlan
from paceline.serve.schedule.serial import serial

BUDGETS = st.builds(Budget, st.integers(1, 20), st.integers(1, 4))


@st.composite
def views(draw):
    """Requests that have not ended, in order of arrival."""
    num = draw(st.integers(0, 6))
    ids = draw(st.lists(st.integers(0, 99), min_size=num, max_size=num, unique=True))
    arrivals = sorted(draw(st.lists(st.floats(0, 9), min_size=num, max_size=num)))
    computed = draw(st.lists(st.integers(0, 40), min_size=num, max_size=num))
    left = draw(st.lists(st.integers(1, 40), min_size=num, max_size=num))
    parts = zip(ids, arrivals, computed, left, strict=True)
    return [RequestView(number, at, done, done + todo) for number, at, done, todo in parts]


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(views(), BUDGETS, st.floats(9, 99))
def test_every_step_keeps_the_contract(name, view, budget, now_s):
    policy = POLICIES.load(name)
    before = copy.deepcopy(view)
    plan = policy(view, budget, now_s)
    assert view == before
    assert policy(view, budget, now_s) == plan
    assert bool(plan.shares) == bool(view)
    requests = {request.id: request for request in view}
    assert len({share.request_id for share in plan.shares}) == len(plan.shares)
    for share in plan.shares:
        request = requests[share.request_id]
        assert 1 <= share.num_tokens <= request.num_total - request.num_computed
    assert sum(share.num_tokens for share in plan.shares) <= budget.max_batch_tokens
    holding = {request.id for request in view if request.num_computed}
    started = {share.request_id for share in plan.shares} - holding
    assert len(started) <= budget.max_sequences


@pytest.mark.parametrize("name", POLICIES)
@settings(deadline=None)
@given(views(), BUDGETS)
def test_every_request_ends(name, view, budget):
    policy = POLICIES.load(name)
    work = sum(request.num_total - request.num_computed for request in view)
    num_steps = 0
    while view:
        shares = {s.request_id: s.num_tokens for s in policy(view, budget, 99.0).shares}
        moved = [
            RequestView(r.id, r.arrival_s, r.num_computed + shares.get(r.id, 0), r.num_total)
            for r in view
        ]
        view = [request for request in moved if request.num_computed < request.num_total]
        num_steps += 1
        assert num_steps <= work


@settings(deadline=None)
@given(views(), BUDGETS)
def test_serial_is_first_come_first_served_in_whole_chunks(view, budget):
    order = []
    for request in list(view):
        while request.num_computed < request.num_total:
            (share,) = serial(view, budget, 0.0).shares
            left = request.num_total - request.num_computed
            assert share.request_id == request.id
            assert share.num_tokens == min(left, budget.max_batch_tokens)
            done = request.num_computed + share.num_tokens
            request = RequestView(request.id, request.arrival_s, done, request.num_total)
            view = [request, *view[1:]]
        order.append(request.id)
        view = view[1:]
    assert serial(view, budget, 0.0) == StepPlan(())
