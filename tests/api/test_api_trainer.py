"""``Trainer`` is ``paceline train``: the same numbers, the same refusals."""

from __future__ import annotations

import json
import os

import pytest

import paceline as pl
from paceline.core.errors import ConfigError, UnknownNameError, UsageError
from paceline.core.record import read_records
from paceline.dist.testing import run_ranks

pytestmark = pytest.mark.cpu

MODEL = "random:llama:tiny"
PLAN = pl.Plan.from_dict(
    {
        "train": {"sequence_length": 16, "tokens_per_step": 64},
        "checkpoint": {"interval_steps": 2},
    }
)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    texts = ["around and around " * n for n in range(1, 12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def _quick_peak(monkeypatch):
    from paceline.kernels import device

    monkeypatch.setitem(device._MATRIX_SIZE, "cpu", 64)


def losses(run):
    records = read_records(run / "records" / "rank-0.jsonl", "step")
    return {record["step"]: record["loss"] for record in records}


def test_a_run_and_its_resumption(tmp_path, data):
    whole = pl.Trainer(MODEL, data=data, out=tmp_path / "whole", plan=PLAN, steps=6).run()
    assert whole.step == 6
    half = pl.Trainer(MODEL, data=data, out=tmp_path / "half", plan=PLAN, steps=3)
    assert half.plan == PLAN
    assert half.folder == tmp_path / "half"
    half.run()
    rest = pl.Trainer.resume(tmp_path / "half", steps=6).run()
    # Rates are of the whole run, so only the steps before the schedules part are the same.
    assert losses(tmp_path / "half")[1] == losses(tmp_path / "whole")[1]
    assert rest.step == 6
    assert set(losses(tmp_path / "half")) == set(range(1, 7))
    with pytest.raises(UsageError, match="at step 6 of 6: done"):
        pl.Trainer.resume(tmp_path / "half")


def test_refusals_come_before_anything_is_written(tmp_path, data):
    out = tmp_path / "run"
    two = pl.Plan.from_dict({"mesh": {"dp_shard": 2}})
    with pytest.raises(ConfigError, match="needs 2 rank"):
        pl.Trainer(MODEL, data=data, out=out, plan=two)
    with pytest.raises(UnknownNameError, match="no-such-model"):
        pl.Trainer("no-such-model", data=data, out=out)
    with pytest.raises(UsageError, match="nowhere"):
        pl.Trainer(MODEL, data=tmp_path / "nowhere.jsonl", out=out)
    with pytest.raises(UsageError, match="unknown device"):
        pl.Trainer(MODEL, data=data, out=out, device="tpu")
    assert not out.exists()
    pl.Trainer(MODEL, data=data, out=out, plan=PLAN, steps=1).run()
    with pytest.raises(UsageError, match="holds a run already"):
        pl.Trainer(MODEL, data=data, out=out, plan=PLAN)


@pytest.mark.ranks
def test_ranks_that_a_launcher_started(tmp_path, data):
    two = PLAN.with_overrides(["mesh.dp_shard=2"])

    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}  # of this fork alone
        record = pl.Trainer(MODEL, data=data, out=tmp_path / "run", plan=two, steps=2).run()
        return record and record.step

    assert run_ranks(run, 2) == [2, None]
    alone = pl.Trainer(MODEL, data=data, out=tmp_path / "alone", plan=PLAN, steps=2)
    alone.run()
    one, other = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert all(abs(one[step] - other[step]) < 1e-5 for step in (1, 2))
