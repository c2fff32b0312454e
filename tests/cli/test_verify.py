"""``paceline verify``: the certificate on the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from paceline.cli.main import main
from paceline.optim.scale import LossScale

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

KEYS = {
    *("certified", "max_rel_grad_error", "max_rel_param_error", "loss_error"),
    *("worst", "per_parameter"),
}
SMALL = ("--set", "train.sequence_length=16", "--set", "train.tokens_per_step=96")


def inside(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paceline", "verify", *SMALL, *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


def test_json_is_the_certificate_and_nothing_else():
    command = [sys.executable, "-m", "paceline", "verify", *SMALL, "--set", "mesh.dp_shard=2"]
    done = subprocess.run(
        [*command, "--json"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == KEYS
    assert found["certified"] is True
    assert 0 <= found["loss_error"] <= 1e-12
    assert 0 < found["max_rel_grad_error"] <= 1e-12
    assert 0 < found["max_rel_param_error"] <= 1e-12
    assert found["per_parameter"]["embedding.weight"].keys() == {"gradient", "weight"}
    assert "Traceback" not in done.stderr


def test_a_sound_plan_is_certified_in_words(monkeypatch, capsys):
    code, out, err = inside(monkeypatch, capsys, "--set", "mesh.dp_replicate=2")
    assert code == 0, err
    assert out.startswith("certified: largest relative errors on 2 rank(s), float64: gradients ")
    assert "error:" not in err


def test_a_plan_file_and_a_model_are_taken(monkeypatch, capsys, tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text('[train]\nfreeze = ["norm.weight"]\n')
    given = ("--plan", str(path), "--model", "random:llama:tiny", "--json")
    code, out, err = inside(monkeypatch, capsys, *given)
    assert code == 0, err
    found = json.loads(out)["per_parameter"]
    assert found["norm.weight"] == {"gradient": 0.0, "weight": 0.0}


@pytest.mark.parametrize("bad", [1.001, math.nan, math.inf])
def test_a_wrong_loss_is_not_certified(monkeypatch, capsys, bad):
    original = LossScale.mean_loss
    monkeypatch.setattr(LossScale, "mean_loss", lambda self, total: bad * original(self, total))
    code, out, err = inside(monkeypatch, capsys, "--json")
    assert code == 1, err

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(out, parse_constant=refuse)
    assert found.keys() == KEYS
    assert found["certified"] is False
    assert found["loss_error"] > 9e-4

    code, out, err = inside(monkeypatch, capsys)
    assert (code, out) == (1, "")
    assert err.count("error:") == 1
    assert "error: not certified: largest relative errors on 1 rank(s)" in err
    assert "hint: the bound is 1e-12" in err
    assert "Traceback" not in err


def test_a_plan_that_cannot_run_is_refused(monkeypatch, capsys):
    code, out, err = inside(monkeypatch, capsys, "--set", "serve.mesh.tp=2", "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: 1 problem in the plan:\nserve.mesh.tp = 2: is not built")
    assert "hint: use 1" in err


def test_a_plan_that_does_not_pay_is_told(monkeypatch, capsys):
    tokens = ("--set", "mesh.cp=2", "--set", "context.method=token-ring")
    code, out, err = inside(monkeypatch, capsys, *SMALL, *tokens)
    assert code == 0
    assert out.startswith("certified: ")
    assert err.startswith('warning: context.method = "token-ring": has the busiest link of 2')
    assert 'hint: use "zigzag-ring" or "ring"' in err


def test_a_frozen_name_that_is_none_is_refused(monkeypatch, capsys):
    code, out, err = inside(monkeypatch, capsys, "--set", 'train.freeze=["head.weight"]')
    assert (code, out) == (2, "")
    assert "matches no parameter" in err
    assert "names look like" in err
    assert "Traceback" not in err
