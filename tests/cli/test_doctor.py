"""``paceline doctor``: what it finds is so, and what is broken is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from paceline.cli.main import main
from paceline.kernels import machine, native

pytestmark = pytest.mark.cpu


def inside(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["paceline", "doctor", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, capsys.readouterr().out


def test_a_machine_that_is_well(monkeypatch, capsys, tmp_path):
    code, out = inside(monkeypatch, capsys, "--json")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert found["versions"]["torch"]["installed"] == torch.__version__
    assert found["devices"][0]["type"] == "cpu"
    assert 0 < found["devices"][0]["cores"] <= os.cpu_count()
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    assert found["backends"] == machine.backends()
    assert found["compiler"] == native.compiler()
    assert "gloo" in found["backends"]
    assert {"parquet", "report", "dev"} <= found["extras"].keys()
    assert found["extras"]["report"]["install"] == "pip install 'paceline[report]'"
    assert found["cache"]["path"] == str(tmp_path / "cache" / "paceline")
    assert found["cache"]["writable"]
    assert not (tmp_path / "cache").exists(), "looking has changed something"
    assert found["cache"]["models"] == []


def test_what_a_person_reads(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    code, out = inside(monkeypatch, capsys)
    assert code == 0
    for part in (torch.__version__, ">=2.11", "gloo", "report", "all that paceline needs is here"):
        assert part in out, part


def test_a_cache_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out = inside(monkeypatch, capsys, "--json")
    assert code == 1
    assert json.loads(out)["problems"] == [
        f"{tmp_path}/file/paceline cannot be written to: set XDG_CACHE_HOME"
    ]


@pytest.mark.ranks
def test_another_torch_and_a_broken_one(tmp_path):
    folder = tmp_path / "torch-9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9\n")
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: no such file')")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [sys.executable, "-m", "paceline", "doctor"],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"COLUMNS": "160"},
    )
    assert done.returncode == 1, done.stderr
    assert "problem: torch 9.9 is outside >=2.11,<2.14" in done.stdout
    assert "problem: torch cannot be imported: libtorch.so: no such file" in done.stdout
    assert "Traceback" not in done.stderr
