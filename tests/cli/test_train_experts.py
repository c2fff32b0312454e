"""`train` with experts on two ranks, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.core.record import read_records

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def train(out: Path, *settings: str, model: str = "random:mixtral:tiny") -> tuple[int, str, str]:
    flags = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "paceline", "train", model, "--steps", "2", "--json"]
    command += ["--data", "builtin:python-stdlib", "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_experts_on_two_ranks_are_one_flag_away(tmp_path):
    step = ("train.sequence_length=32", "train.tokens_per_step=256")
    shared_out = ("mesh.dp_shard=2", "mesh.ep=2", "expert.balance_loss_weight=0.01")
    status, text, log = train(tmp_path, *step, *shared_out)
    assert status == 0, log
    record = json.loads(text)
    assert 1 <= record["expert_load"] <= 8
    assert record["balance_loss"] > 1
    assert "expert load" in log
    for rank in range(2):
        steps = list(read_records(tmp_path / "records" / f"rank-{rank}.jsonl", "step"))
        assert [found["expert_load"] for found in steps][-1] == record["expert_load"]


@pytest.mark.parametrize(
    ("settings", "model", "said"),
    [
        (("mesh.dp_shard=2", "mesh.ep=3"), "random:mixtral:tiny", "mesh.ep = 3: must divide"),
        (("mesh.dp_shard=2", "mesh.ep=2"), "random:llama:tiny", "has none"),
    ],
)
def test_what_is_illegal_is_refused_before_anything_is_made(tmp_path, settings, model, said):
    status, text, log = train(tmp_path / "run", *settings, model=model)
    assert (status, text) == (2, "")
    assert said in log
    assert "hint: use " in log
    assert not (tmp_path / "run").exists()
