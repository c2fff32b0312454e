from __future__ import annotations

import pytest

from paceline.bench import adapters
from paceline.core.errors import UnknownNameError
from paceline.models.hub import resolve

pytestmark = pytest.mark.cpu


def test_requests_with_adapters_are_measured_beside_those_without(monkeypatch):
    monkeypatch.setattr(adapters, "NUM_TOKENS", 3)
    outcome = adapters.measure(resolve("random:llama:tiny"), "float32", pairs=2)
    assert outcome.ratios.pairs == 2
    assert min(outcome.ours, outcome.peer, outcome.ratios.lowest) > 0
    assert outcome.fraction == pytest.approx(outcome.ours / outcome.peer)


def test_another_peer_is_named():
    with pytest.raises(UnknownNameError, match="unknown peer 'vllm'"):
        adapters.run(against="vllm")
