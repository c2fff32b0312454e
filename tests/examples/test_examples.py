"""Every example runs; what it prints it has also asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

FOLDER = Path(__file__).parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RANDOM = "random:llama:tiny"
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "load_and_generate.py": ((), (RANDOM,), "likeliest next token"),
    "train_tiny.py": ((), (), "goes on with ' of riders'"),
    "resume.py": ((), (), "gave the same losses both times"),
    "parallel_hf_model.py": (TORCHRUN, (), "rank 1 holds"),
    "split_hf_model.py": (TORCHRUN, (), "saved as one model, and read by one process"),
    "verify_plan.py": ((), (), 'train.compile = "on": has not been proved with mesh.tp > 1'),
    "serve_and_ask.py": ((), (), "is served at http://127.0.0.1"),
}
"""Example to what starts it, its arguments, and a part of what it prints."""


def run(launcher: tuple[str, ...], name: str, *arguments: str) -> str:
    command = [sys.executable, *launcher, str(FOLDER / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    others = {"demo.py"}  # make demo
    assert {path.name for path in FOLDER.glob("*.py")} == COMMANDS.keys() | others


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example(name):
    launcher, arguments, expected = COMMANDS[name]
    assert expected in run(launcher, name, *arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_is_short(name):
    assert len((FOLDER / name).read_text().splitlines()) < 100


@pytest.mark.slow
@pytest.mark.parametrize("name", ["load_and_generate.py", "serve_and_ask.py"])
def test_an_example_on_a_real_model(name):
    assert "Paris" in run((), name, "smollm2-135m") or name == "serve_and_ask.py"
