"""Spread words beside edge stages: the same work, sound plans, and peaks that are counted right."""

from __future__ import annotations

import pytest

from paceline.bench import vocabulary
from paceline.bench.vocabulary import Memory, _largest_in_step, _plan, _spec, measure, memory
from paceline.core.errors import PacelineError
from paceline.plan.check import check

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(vocabulary, "LENGTH", 16)
    monkeypatch.setattr(vocabulary, "NUM_MICROBATCHES", 2)


@pytest.mark.parametrize("schedule", ["one-f-one-b", "v-half"])
@pytest.mark.parametrize("barriers", [0, 1, 2])
def test_plans_are_sound_and_give_ranks_as_many_layers(schedule, barriers):
    spec = _spec("random:llama:135m", 8)
    plan = _plan(spec, schedule, barriers=barriers)
    assert check(plan, spec, num_ranks=2) == []
    assert plan.pipeline.stage_cuts == ((4,) if schedule == "one-f-one-b" else (2, 4, 6))


@pytest.mark.usefixtures("_small")
def test_both_sides_agree():
    """On the first two losses, or it is an error."""
    found = measure(model="random:llama:tiny", layers=2, pairs=1, barriers=2)
    assert min(found.ours, found.peer, found.ratios.lowest) > 0
    assert "of 2 layers, 2 x 2 x 16 tokens" in found.name


@pytest.mark.usefixtures("_small")
def test_a_side_that_does_other_work_is_an_error(monkeypatch):
    monkeypatch.setattr(vocabulary, "_LOSS_ERROR", -1.0)
    with pytest.raises(PacelineError, match="not the same work"):
        measure(model="random:llama:tiny", layers=2, pairs=1)


@pytest.mark.usefixtures("_small")
def test_memory_of_ranks_is_alike_where_words_are_spread():
    """A tiny model is half words: the ends weigh on edge stages."""
    found = memory(model="random:llama:tiny", layers=2, schedule="one-f-one-b")
    assert len(found.spread_bytes) == len(found.edges_bytes) == 2
    assert max(found.spread_bytes) < max(found.edges_bytes)


def test_peaks_are_sums_of_what_is_held_in_the_step():
    def memory_event(at: float, size_bytes: int, device: int = 0) -> dict:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size_bytes, "Device Type": device}}

    events = [
        {"name": "the measured step", "ts": 10.0, "dur": 5.0},
        memory_event(1, 100),
        memory_event(2, 1000),
        memory_event(3, -1000),  # before the step
        memory_event(11, 30),
        memory_event(12, 5),
        memory_event(13, -30),
        memory_event(12.5, 7000, device=1),  # another device
        memory_event(16, 500),  # after it
    ]
    assert _largest_in_step(events) == 135


def test_imbalance_is_the_largest_over_the_smallest():
    found = Memory("v-half", (110, 100), (300, 100))
    assert (found.spread_imbalance, found.edges_imbalance) == pytest.approx((0.1, 2.0))
