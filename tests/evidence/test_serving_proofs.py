"""A tenth of the proofs of serving that `make evidence` runs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))


def test_clients_that_leave_at_random_leave_nothing_behind(tmp_path):
    import disconnects

    records = disconnects.prove(tmp_path, 1000)
    assert sum(record["requests"] for record in records) == 1000
    assert sum(record["left"] for record in records) > 500
    assert disconnects.prove(tmp_path, 1000) == records, "a finished proof is not run again"


def test_a_saturated_server_is_steady(tmp_path):
    import soak

    records = soak.prove(tmp_path, 40.0, intervals=10)
    assert len(records) == 10
    assert soak.prove(tmp_path, 40.0, intervals=10) == records
