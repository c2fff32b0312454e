"""A tenth of the long proof that `make evidence` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

LIMIT_S = 30.0


def test_killed_and_stopped_ranks_are_replaced_and_the_losses_stay(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))
    from recovery import LAYOUTS, prove, summary

    (layout, *_) = LAYOUTS
    records = prove(tmp_path, 2, [layout])
    assert [record["signal"] for record in records] == ["SIGSTOP", "SIGKILL"]
    assert all(0 < record["time_s"] < LIMIT_S for record in records)
    assert "the next step was finished after" in summary(records)
    assert prove(tmp_path, 2, [layout]) == records, "a finished proof is not run again"
