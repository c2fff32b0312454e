"""The proof that `evidence/ladder_retrained.py` runs, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.core.errors import PacelineError

pytestmark = [pytest.mark.ranks, pytest.mark.slow]


def test_a_model_is_converted_trained_and_compared_once(tmp_path, monkeypatch):
    """A random model has nothing to lose by conversion, so its share of it is not looked at."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "evidence"))
    import ladder_retrained as proof

    monkeypatch.setattr(proof, "LEAST_REGAINED", -float("inf"))
    records = proof.prove(tmp_path / "proof", model="random:llama:tiny", num_steps=3)
    assert [record["text"] for record in records] == ["held-out", "prose"]
    assert all(record["retrained_loss"] < record["converted_loss"] for record in records)
    assert all(record["plain_loss"] != record["converted_loss"] for record in records)
    assert records[0]["core_s"] > 0
    again = proof.prove(tmp_path / "proof", model="random:llama:tiny", num_steps=3)
    assert again == records, "a finished proof is not run again"
    monkeypatch.setattr(proof, "LEAST_REGAINED", float("inf"))
    with pytest.raises(PacelineError, match="came back, of at least"):
        proof.prove(tmp_path / "proof", model="random:llama:tiny", num_steps=3)
