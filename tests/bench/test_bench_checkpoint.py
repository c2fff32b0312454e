"""A save's stall and the loop beside saves are measured beside torch's, on a small model."""

from __future__ import annotations

import pytest

from paceline.bench import checkpoint
from paceline.bench.outcome import MIN_PAIRS
from paceline.core.errors import UnknownNameError

pytestmark = [pytest.mark.cpu, pytest.mark.slow]  # torch's side waits for many disk writes


def test_both_sides_are_measured_in_turns():
    outcomes = checkpoint.run(model="random:llama:tiny")
    assert set(outcomes) == {"stall", "loop"}
    for outcome in outcomes.values():
        assert outcome.ratios.pairs == MIN_PAIRS
        assert outcome.ratios.lowest <= outcome.ratios.median <= outcome.ratios.highest
        assert min(outcome.ours, outcome.peer) > 0
        assert outcome.fraction == pytest.approx(outcome.ours / outcome.limit)


def test_another_peer_is_named():
    with pytest.raises(UnknownNameError, match="unknown peer 'torch'"):
        checkpoint.run(against="torch")
