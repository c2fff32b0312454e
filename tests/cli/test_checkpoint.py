"""``paceline checkpoint``: inspect, verify, export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.main import main

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

STEPS = 2


def run_inside(*arguments: object) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["paceline", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
    return caught.value.code


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data.txt").write_text("to and fro " * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        settings = ("train.sequence_length=16", "train.tokens_per_step=64")
        given = [
            *("train", "random:llama:tiny", "--data", folder / "data.txt", "--out", folder / "run"),
            *("--steps", STEPS, "--set", "checkpoint.interval_steps=1"),
            *(part for setting in settings for part in ("--set", setting)),
        ]
        assert run_inside(*given) == 0
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def checkpoint(capsys):
    """Runs a sub-command: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[Any, str, str]:
        capsys.readouterr()
        code = run_inside("checkpoint", *arguments)
        return code, *capsys.readouterr()

    return call


def test_inspect_says_what_the_newest_checkpoint_holds(checkpoint, run):
    code, out, err = checkpoint("inspect", run, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found.keys() == {
        *("path", "step", "versions", "plan", "model", "files", "tensors", "progress", "format"),
    }
    assert found["path"] == str(run / "checkpoints" / f"step-{STEPS}")
    assert found["step"] == STEPS
    assert found["plan"]["train"]["sequence_length"] == 16
    assert found["model"]["family"] == "llama"
    assert found["tensors"]["model.norm.weight"] == {
        "shape": [48],
        "dtype": "float32",
        "axes": ["norm"],
        "pieces": [],
    }
    assert found["progress"]["cursor"]["tokens"] == STEPS * 64
    assert set(found["files"]) == {".metadata", "__0_0.distcp"}

    code, out, _ = checkpoint("inspect", run / "checkpoints" / "step-1")
    assert code == 0
    assert out.startswith(
        f"{run / 'checkpoints' / 'step-1'}: step 1, {len(found['tensors'])} tensors"
    )
    assert "  model.embedding.weight  float32  [259, 48]\n" in out


def test_verify_compares_checksums(checkpoint, run):
    newest = run / "checkpoints" / f"step-{STEPS}"
    code, out, err = checkpoint("verify", run, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"path": str(newest), "step": STEPS, "whole": True}
    assert checkpoint("verify", newest) == (0, f"{newest}: all 2 files are whole\n", "")

    data = newest / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[-100] ^= 2
    data.write_bytes(content)
    code, out, err = checkpoint("verify", run, "--json")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {data} is damaged: its checksum has changed\n")
    assert "hint: the checkpoint is damaged: resume from an older one" in err
    assert checkpoint("verify", run / "checkpoints" / "step-1")[0] == 0


def test_export_makes_a_model_that_can_be_used(checkpoint, run, tmp_path):
    code, out, err = checkpoint("export", run, "-o", tmp_path / "model", "--json")
    assert (code, err) == (0, "")
    newest = run / "checkpoints" / f"step-{STEPS}"
    assert json.loads(out) == {"path": str(tmp_path / "model"), "checkpoint": str(newest)}
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    command = ["generate", str(tmp_path / "model"), "--prompt", "to", "--max-tokens", "3", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "paceline", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_export_gives_the_weights_of_the_named_checkpoint(checkpoint, run, tmp_path, monkeypatch):
    files = []
    monkeypatch.chdir(run / "checkpoints")
    for path in ("step-1", run / "checkpoints" / "step-1", run):  # from where it is, too
        files.append(tmp_path / f"model-{len(files)}")
        assert checkpoint("export", path, "-o", files[-1]) == (0, f"{files[-1]}\n", "")
    contents = [(path / "model.safetensors").read_bytes() for path in files]
    assert contents[0] == contents[1] != contents[2]


def test_an_existing_folder_is_not_written_to(checkpoint, run, tmp_path):
    code, out, err = checkpoint("export", run, "-o", tmp_path)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path} exists already\n\nhint: export to a new folder\n"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("verb", ["inspect", "verify", "export"])
def test_what_is_no_checkpoint_is_one_error(checkpoint, tmp_path, verb):
    out_option = ("-o", tmp_path / "out") if verb == "export" else ()
    code, out, err = checkpoint(verb, tmp_path, *out_option)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} holds no complete checkpoint\n")
    assert err.count("error:") == 1
    assert "hint: give a run folder that has saved once" in err


@pytest.mark.parametrize("verb", ["inspect", "verify", "export"])
def test_a_foreign_manifest_is_one_error(checkpoint, run, tmp_path, verb):
    manifest = run / "checkpoints" / f"step-{STEPS}" / "manifest.json"
    manifest.write_text('{"format": 1, "step": 2}')
    out_option = ("-o", tmp_path / "out") if verb == "export" else ()
    code, out, err = checkpoint(verb, run, *out_option)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {manifest} is damaged")
    assert "Traceback" not in err


def test_a_checkpoint_away_from_its_run_cannot_be_exported(checkpoint, run, tmp_path):
    away = shutil.copytree(run / "checkpoints" / "step-1", tmp_path / "away" / "a" / "step-1")
    code, out, err = checkpoint("export", away, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "is not a run folder: no model/config.json" in err
    assert "hint: give a run folder" in err
    assert not (tmp_path / "out").exists()
