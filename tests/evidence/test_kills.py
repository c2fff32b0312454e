"""A tenth of the long proof that `make evidence` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.mark.parametrize(("kills", "ranks"), [(18, 1), (2, 2)])
def test_a_killed_run_logs_what_an_uninterrupted_run_logs(tmp_path, monkeypatch, kills, ranks):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))
    from kills import prove

    records = prove(tmp_path, kills, ranks)
    assert [record["number"] for record in records] == list(range(1, kills + 1))
    assert any(record["resumed_from"] for record in records)
    assert prove(tmp_path, kills, ranks) == records, "a finished proof is not run again"
