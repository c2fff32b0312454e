"""Policies beside each other: the recording, its replay, and outcomes that say what was done."""

from __future__ import annotations

import json
import math

import pytest

from paceline.bench.arrivals import (
    RECORDING,
    Arrival,
    Replayed,
    draw_recording,
    read_recording,
    replay,
)
from paceline.bench.policies import _engine, measure
from paceline.models.hub import resolve

pytestmark = pytest.mark.cpu

MODEL = "random:llama:tiny"


def test_the_recording_is_what_its_seed_gives():
    recorded = json.loads(RECORDING.read_text())
    assert recorded == json.loads(json.dumps(draw_recording(recorded["seed"])))
    for arrivals in read_recording().values():
        assert sum(one.gap for one in arrivals) / len(arrivals) == pytest.approx(1, abs=1e-3)


def test_the_longest_gaps():
    replayed = Replayed(1.0, 1.0, [float(gap) for gap in range(100, 0, -1)])
    assert [replayed.gap_s(share) for share in (0.5, 0.99, 1.0)] == [50, 99, 100]


def test_a_replay_asks_all_at_their_times():
    engine = _engine(resolve(MODEL), "stall-free")
    arrivals = [Arrival(1.0, 5, 4), Arrival(2.0, 9, 3), Arrival(0.0, 300, 1)]
    found = replay(engine, arrivals, 20.0, "anyone")
    assert len(found.gaps_s) == 3 + 2
    assert found.rate < 8 / 0.15  # the last comes 3 / 20 s after the start
    assert replay(engine, arrivals, math.inf, "another").rate > 0
    assert engine.book.num_found_tokens == 0


def test_outcomes():
    arrivals = [Arrival(1.0, 40, 6), Arrival(1.0, 250, 3), Arrival(1.0, 8, 9)]
    outcomes = measure(resolve(MODEL), arrivals, arrivals, pairs=1)
    assert all(one.ratios.median > 0 for one in outcomes.values())
    tokens = outcomes["global-prefix, tokens"]
    assert tokens.ours == tokens.limit < tokens.peer
