"""``paceline convert``, and what other verbs make of a converted model."""

from __future__ import annotations

import json
import sys

import pytest

from paceline.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


@pytest.fixture
def inside(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    return run


def test_a_converted_model_is_trained_exported_and_generates(inside, tmp_path):
    ladder, run = tmp_path / "ladder", tmp_path / "run"
    code, out, _ = inside("convert", "random:llama:tiny", "--to", "ladder", "-o", ladder, "--json")
    assert code == 0
    assert json.loads(out) == {
        "path": str(ladder),
        "to": "ladder",
        "family": "llama",
        "num_layers": 3,
        "ladder_from": 1,
    }
    (tmp_path / "text.txt").write_text("to and fro " * 100)
    settings = ("--set", "train.sequence_length=16", "--set", "train.tokens_per_step=64")
    text = tmp_path / "text.txt"
    code, _, err = inside(
        "train", ladder, "--data", text, "--steps", 2, "--out", run, *settings, "--json"
    )
    assert code == 0, err
    exported = tmp_path / "exported"
    assert inside("checkpoint", "export", run, "-o", exported)[0] == 0
    config = json.loads((exported / "config.json").read_text())
    assert config == json.loads((ladder / "config.json").read_text())
    prompt = ("--prompt", "to and", "--max-tokens", 4, "--temperature", 0, "--json")
    code, out, err = inside("generate", exported, *prompt)
    assert code == 0, err
    assert len(json.loads(out)["token_ids"]) == 4
    code, _, err = inside("convert", exported, "--to", "ladder", "-o", tmp_path / "again")
    assert code == 2
    assert "a ladder from layer 1 on already" in err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--to", "laddr", "-o", "out"), "unknown architecture to convert to 'laddr'", "ladder"),
        (("--to", "ladder", "-o", "."), ". exists already", "convert to a new folder"),
        (("--to", "ladder", "-o", "out", "--layers", "al"), "unknown choice of layers 'al'", "all"),
        (("-o", "out"), "Missing option '--to'", "paceline convert --help"),
    ],
)
def test_bad_usage(inside, monkeypatch, tmp_path, arguments, message, hint):
    monkeypatch.chdir(tmp_path)
    code, out, err = inside("convert", "random:llama:tiny", *arguments, "--json")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert hint in err.split("hint: ")[1]
    assert not (tmp_path / "out").exists()
