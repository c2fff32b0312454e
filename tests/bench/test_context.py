"""Both rings do the same work, in turns."""

from __future__ import annotations

import pytest

from paceline.bench import context
from paceline.core.errors import PacelineError

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def test_a_zigzag_is_measured_beside_a_contiguous_ring():
    outcome = context.measure(2, length=64)
    assert outcome.name.startswith("cp 2, attention over 64 causal tokens, ")
    assert outcome.ratios.pairs == 2
    assert min(outcome.ours, outcome.peer, outcome.ratios.lowest) > 0
    assert outcome.fraction == pytest.approx(outcome.ours / outcome.limit)
    assert "2 gloo ranks" in outcome.device


def test_sides_that_do_other_work_are_an_error(monkeypatch):
    original = context._step

    def step(plan, world, length):
        factor = 2.0 if plan.context.method == "ring" else 1.0
        run = original(plan, world, length)
        return lambda: factor * run()

    monkeypatch.setattr(context, "_step", step)
    with pytest.raises(PacelineError, match="not the same work"):
        context.measure(1, length=32)
