"""Serving over ranks is measured beside one process, and stages beside stages that wait."""

from __future__ import annotations

import pytest

from paceline.bench import serve_ranks
from paceline.bench.outcome import MIN_PAIRS

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_all_sides_are_measured(monkeypatch):
    monkeypatch.setattr(serve_ranks, "NUM_TOKENS", 4)
    found = serve_ranks.run(model="random:llama:tiny")
    assert found.keys() == {"tp", "pp", "non-blocking"}
    for outcome in found.values():
        assert outcome.ratios.pairs == MIN_PAIRS
        assert outcome.ratios.lowest <= outcome.ratios.median <= outcome.ratios.highest
        assert outcome.fraction == pytest.approx(outcome.ours / outcome.limit)
    assert "one process" in found["tp"].against
    assert "blocking" in found["non-blocking"].against
