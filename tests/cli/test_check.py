"""``paceline check``: every problem of a plan at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from paceline.cli.main import main
from paceline.cli.options import read_plan
from paceline.core.errors import ConfigError

pytestmark = pytest.mark.ranks

BAD = """
[mesh]
tp = 2
[train]
sequence_length = 100
tokens_per_step = 250
[optimizer]
lr = -1.0
[serve.mesh]
tp = 2
"""
GOOD = "[mesh]\ndp_shard = 2\n[train]\nsequence_length = 128\n"


def inside(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paceline", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


@pytest.fixture
def plan(tmp_path):
    def write(text: str):
        path = tmp_path / "plan.toml"
        path.write_text(text)
        return path

    return write


def test_a_sound_plan_has_no_problems(monkeypatch, capsys, plan):
    path = plan(GOOD)
    assert inside(monkeypatch, capsys, path) == (0, f"{path}: no problems\n", "")
    code, out, err = inside(monkeypatch, capsys, path, "--json")
    assert (code, json.loads(out), err) == (0, {"problems": [], "warnings": []}, "")


def test_json_lists_every_problem(plan):
    command = [sys.executable, "-m", "paceline", "check", str(plan(BAD)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (2, "")
    problems = json.loads(done.stdout)["problems"]
    assert all(problem.keys() == {"path", "value", "rule", "hint"} for problem in problems)
    found = {(problem["path"], problem["value"]) for problem in problems}
    assert found == {
        ("serve.mesh.tp", "2"),
        ("optimizer.lr", "-1.0"),
        ("train.tokens_per_step", "250"),
    }


def test_text_lists_every_problem_in_one_error(monkeypatch, capsys, plan):
    path = plan(BAD)
    code, out, err = inside(monkeypatch, capsys, path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: 3 problems in {path}:\n")
    assert err.count("error:") == 1
    assert "serve.mesh.tp = 2: is not built in this version\n  hint: use 1" in err
    assert "optimizer.lr = -1.0: must be positive" in err
    assert "hint: use 200 or 300\n" in err


def test_settings_are_part_of_the_plan(monkeypatch, capsys, plan):
    settings = ("--set", "serve.mesh.tp=1", "--set", "optimizer.lr=1")
    code, out, _ = inside(monkeypatch, capsys, plan(BAD), *settings, "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, problem["path"]) == (2, "train.tokens_per_step")
    assert problem["hint"] == "use 200 or 300"


def test_a_model_adds_its_own_rules(monkeypatch, capsys, plan):
    path = plan("[train]\nsequence_length = 513\ntokens_per_step = 513\n")
    assert inside(monkeypatch, capsys, path)[0] == 0
    code, out, _ = inside(monkeypatch, capsys, path, "--model", "random:llama:tiny", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, problem["path"]) == (2, "train.sequence_length")
    assert "512 tokens" in problem["rule"]


@pytest.mark.parametrize("as_json", [True, False])
def test_unknown_keys_are_problems_too(monkeypatch, capsys, plan, as_json):
    path = plan("[mseh]\ntp = 1\n[train]\nsede = 1\n")
    code, out, err = inside(monkeypatch, capsys, path, *(["--json"] if as_json else []))
    assert code == 2
    if as_json:
        found = [(problem["path"], problem["hint"]) for problem in json.loads(out)["problems"]]
        assert found == [("mseh", "did you mean mesh?"), ("train.sede", "did you mean seed?")]
    else:
        assert err.startswith(f"error: 2 problems in {path}:")
        assert "did you mean mesh?" in err


def test_what_does_not_parse_hides_nothing_else(monkeypatch, capsys, plan):
    text = '[mesh]\ntp = "two"\npp = 9\n[zero]\nstage = 3\n[train]\ntokens_per_step = 250\n'
    path, model = plan(text), ("--model", "random:llama:tiny")
    _, out, _ = inside(monkeypatch, capsys, path, *model, "--set", "train.seed=many", "--json")
    assert [problem["path"] for problem in json.loads(out)["problems"]] == [
        "mesh.tp",
        "train.seed",
        "train.tokens_per_step",
        "zero.stage",
        "mesh.pp",
    ]
    with pytest.raises(ConfigError) as caught:  # so with every other verb, but for the model's
        read_plan(path, ["train.seed=many"])
    assert str(caught.value).startswith(f"4 problems in {path} and --set:\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read {path}: No such file"), ("[mesh", "{path} is not TOML")],
)
def test_a_file_that_is_no_plan_is_one_error(monkeypatch, capsys, tmp_path, content, message):
    path = tmp_path / "plan.toml"
    if content is not None:
        path.write_text(content)
    code, out, err = inside(monkeypatch, capsys, path)
    assert (code, out) == (2, "")
    assert err.startswith("error: " + message.format(path=path))
    assert "Traceback" not in err


def test_a_plan_that_does_not_pay_is_told(monkeypatch, capsys, plan):
    path = plan('[mesh]\ncp = 4\n[context]\nmethod = "token-ring"\n')
    model = ("--model", "random:llama:tiny")
    code, out, err = inside(monkeypatch, capsys, path, *model)
    assert (code, out) == (0, f"{path}: no problems\n")
    assert err.startswith('warning: context.method = "token-ring": has the busiest link of 4 ranks')
    code, out, err = inside(monkeypatch, capsys, path, *model, "--json")
    (warning,) = json.loads(out)["warnings"]
    assert (code, err, warning["path"]) == (0, "", "context.method")
    assert warning.keys() == {"path", "value", "rule", "hint"}
