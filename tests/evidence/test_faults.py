"""A seeded tenth of the proof over injected faults."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow, pytest.mark.alone]


def test_the_culprit_is_named_and_a_clean_run_raises_no_alarm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))
    import faults

    trials = {kind: count // 10 for kind, count in faults.NUM_TRIALS.items()}
    records = faults.prove(tmp_path / "faults.jsonl", trials)
    assert [record for record in records if not record["is_right"]] == []
    assert len(records) == sum(trials.values())
    # What is done is not done again.
    assert faults.prove(tmp_path / "faults.jsonl", trials) == records
