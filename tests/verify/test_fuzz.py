"""Random plans: what can be drawn, and that a failure is told."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.core.errors import UsageError
from paceline.memory.remat import REMAT
from paceline.models.families import FAMILIES
from paceline.parallel.context import METHODS
from paceline.parallel.tensor import decoder
from paceline.plan.check import check
from paceline.plan.mesh import AXES
from paceline.plan.plan import Plan
from paceline.verify.fuzz import draw, fuzz

DRAWS = [draw(0, number) for number in range(300)]


def test_a_draw_is_a_function_of_seed_and_number():
    assert [draw(0, number) for number in (0, 7, 299)] == [DRAWS[0], DRAWS[7], DRAWS[299]]
    assert draw(1, 7) != DRAWS[7]


def test_every_axis_schedule_stage_and_family_comes_up():
    plans = [plan for plan, _ in DRAWS]
    for axis in (*AXES, "ep"):
        degrees = {getattr(plan.mesh, axis) for plan in plans}
        assert {1, 2, 3, 4} <= degrees, axis
    assert {plan.mesh.num_ranks for plan in plans} == set(range(2, 9))
    assert len({plan.pipeline.schedule for plan in plans if plan.mesh.pp > 1}) == 6
    assert {plan.zero_stage for plan in plans} == {0, 1, 2, 3}
    assert {spec.family for _, spec in DRAWS} == set(FAMILIES)
    assert {plan.context.method for plan in plans if plan.mesh.cp > 1} == set(METHODS)
    words = {(p.pipeline.vocabulary, p.pipeline.vocabulary_barriers) for p in plans}
    assert words == {("edges", 1), ("spread", 1), ("spread", 2)}
    assert {plan.memory.remat for plan in plans} == set(REMAT)
    assert any(spec.ladder_from is not None and plan.mesh.tp > 1 for plan, spec in DRAWS)
    assert any(plan.expert.balance_loss_weight and plan.mesh.ep > 1 for plan in plans)
    assert any(plan.mesh.cp > 1 and plan.mesh.tp > 1 and plan.mesh.ep > 2 for plan in plans)
    assert any(plan.pipeline.stage_cuts for plan in plans)
    assert {plan.tensor.sequence_parallel for plan in plans if plan.mesh.tp > 1} == {True, False}


def test_few_draws_are_refused():
    refused = Counter(
        f"{problems[0].path}: {problems[0].rule}"
        for plan, spec in DRAWS
        if (problems := check(plan, spec))
    )
    assert refused.total() <= 0.2 * len(DRAWS), refused


@pytest.mark.cpu
@pytest.mark.ranks
def test_a_plan_that_computes_something_else_is_a_failure(monkeypatch):
    number = next(n for n, (plan, _) in enumerate(DRAWS) if plan.mesh.shape == (1, 1, 1, 1, 2))
    monkeypatch.setattr("paceline.verify.fuzz.draw", lambda _seed, _number: DRAWS[number])
    monkeypatch.setattr(decoder, "sum_up", lambda x, _world: x)
    monkeypatch.setattr(
        decoder, "scatter_rows", lambda x, world: decoder.own_rows(x, world), raising=False
    )
    report = fuzz(1, 0)
    assert (report.drawn, report.certified, report.refused) == (1, 0, 0)
    (failed,) = report.failed
    assert failed["why"].startswith("plan 0: ")
    assert "tp = 2" in failed["plan"]


@pytest.mark.cpu
@pytest.mark.ranks
def test_the_command_gives_one_object():
    result = CliRunner().invoke(app, ["verify", "--fuzz", "2", "--seed", "3", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["drawn"] == 2 == found["certified"] + found["refused"]
    assert found["failed"] == []
    assert "worst" in found


def test_fuzz_takes_no_plan_of_one_s_own():
    result = CliRunner().invoke(app, ["verify", "--fuzz", "2", "--set", "mesh.tp=2"])
    assert isinstance(result.exception, UsageError)


def test_draws_round_trip():
    for plan, _ in DRAWS[:50]:
        assert Plan.from_dict(plan.to_dict()) == plan
