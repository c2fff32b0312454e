from __future__ import annotations

import pytest

from paceline.bench import watch
from paceline.core.errors import UnknownNameError
from paceline.models.families.llama import PRESETS

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def test_watched_steps_are_measured_beside_unwatched_ones():
    outcome = watch.measure(PRESETS["tiny"], pairs=3)
    assert outcome.ratios.pairs == 3
    assert min(outcome.ours, outcome.peer, outcome.ratios.lowest) > 0
    assert outcome.fraction == pytest.approx(outcome.ours / outcome.peer)
    # The cost is below a hundredth (docs/benchmarks.md); three short pairs show that it is no
    # multiple of a step.
    assert outcome.ratios.median > 0.5


def test_another_peer_is_named():
    with pytest.raises(UnknownNameError, match="unknown peer 'torch'"):
        watch.run(against="torch")
