"""A seeded tenth of the proof that `make certified` runs; the matrix has tests of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.core.errors import PacelineError

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


@pytest.fixture
def proof(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))
    import certified

    return certified


def test_a_tenth_of_the_random_plans_is_certified(proof, tmp_path):
    records = proof.prove(tmp_path, names=["tp 2"], num_plans=proof.NUM_PLANS // 10)
    assert len(records) == 1 + proof.NUM_PLANS // 10
    assert proof.prove(tmp_path, names=["tp 2"], num_plans=3) == records, "nothing is run twice"
    text = proof.page(records, "abc1234")
    assert "| tp 2 | " in text
    assert "commit abc1234" in text


def test_a_failed_plan_fails_the_proof(proof, tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "BOUND", 0.0)
    failed = proof.trial(0, 0)
    monkeypatch.setattr(
        proof, "trial", lambda _seed, _number: type(failed)(failed.plan, "x", "failed", 0.0, "y")
    )
    with pytest.raises(PacelineError, match=r"random plans failed: .*x: y"):
        proof.prove(tmp_path, names=[], num_plans=1)
