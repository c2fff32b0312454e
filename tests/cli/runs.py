"""Runs of the command, in processes of their own or in this one, and what they have logged."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from paceline.cli.main import main
from paceline.core.record import read_records
from paceline.train.run import RunFolder

MODEL = "random:llama:tiny"
SMALL = ("--set", "train.sequence_length=16", "--set", "train.tokens_per_step=96")
TWO_RANKS = ("--set", "mesh.dp_shard=2")


def write_data(folder: Path) -> str:
    """Documents of many lengths, for a SRC."""
    path = folder / "data.jsonl"
    texts = ["around and around " * n for n in range(1, 30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def paceline(*arguments: str, limit_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "paceline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)


def inside(monkeypatch, capsys, *arguments: str) -> tuple[Any, str, str]:
    """The same in this process, for the many cases: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["paceline", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code, *capsys.readouterr()


def assert_one_error(err: str, message: str, hint: str = "") -> None:
    assert err.count("error:") == 1, err
    assert message in err
    assert "hint: " + hint in err
    assert "Traceback" not in err
    assert "Warning" not in err


def step_losses(run: Path) -> list[tuple[int, float]]:
    records = read_records(RunFolder(run).records(0), "step")
    return [(record["step"], record["loss"]) for record in records]


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def all_end_within(pids: list[int], limit_s: float) -> bool:
    deadline_s = time.monotonic() + limit_s
    while any(map(is_running, pids)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not any(map(is_running, pids))
