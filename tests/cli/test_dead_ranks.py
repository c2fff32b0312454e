"""A rank that dies ends the run: soon, with one error: which rank, where, and why."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from paceline.checkpoint.manifest import newest_checkpoint, read_manifest

pytestmark = [pytest.mark.cpu, pytest.mark.ranks, pytest.mark.slow]

LIMIT_S = 10.0
NUM_MICROBATCHES = 2
AXES = ("pp", "tp", "dp_shard", "dp_replicate")
ENDS = {
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
    "exit": "os._exit(3)",
    "exception": 'raise KeyError("the saddle")',
    "expected": 'raise DataError("a flat tyre", hint="mend it")',
}
# Python reads it as it starts. In the middle of its third step rank 1 ends.
FAULT = """
import os, signal, time
if os.environ.get("RANK") == "1":
    import torch
    from paceline.core.errors import DataError
    backward, calls = torch.Tensor.backward, []
    def stumble():
        open({died!r}, "w").write(str(time.time()))
        {end}
    def count(self, *arguments, **named):
        calls.append(1)
        if len(calls) == {call}:
            stumble()
        backward(self, *arguments, **named)
    torch.Tensor.backward = count
"""


class Ended(NamedTuple):
    """A run with a fault: its exit code, its stderr, and the seconds from the fault to its end."""

    code: int
    err: str
    time_s: float


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains on two ranks, of which the second comes to an end."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "around " * n}) + "\n" for n in range(9, 40)))
    (tmp_path / "faults").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def start(launcher: tuple[str, ...], axis: str, end: str, saves: int) -> Ended:
        died = tmp_path / "died"
        call = 2 * NUM_MICROBATCHES + 1
        fault = FAULT.format(died=str(died), end=ENDS[end], call=call)
        (tmp_path / "faults" / "sitecustomize.py").write_text(fault)
        paths = [str(tmp_path / "faults"), *sys.path]
        monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, paths)))
        settings = {
            f"mesh.{axis}": 2,
            "train.sequence_length": 16,
            "train.tokens_per_step": 16 * 4,
            "pipeline.num_microbatches": NUM_MICROBATCHES,
            "checkpoint.interval_steps": saves,
        }
        given = ["train", "random:llama:tiny", "--data", str(data), "--steps", "100"]
        given += ["--out", str(tmp_path / "run"), "--json"]
        given += [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "paceline", *given],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        ended_s = time.time()
        assert died.exists(), done.stderr
        assert done.stdout == ""
        return Ended(done.returncode, done.stderr, ended_s - float(died.read_text()))

    return start


def assert_told(ended: Ended, message: str, hint: str, *, is_traced: bool) -> None:
    assert ended.time_s < LIMIT_S
    assert ended.code == 1
    said = ended.err[ended.err.index("error: ") :]
    assert said.startswith(f"error: {message}"), ended.err
    assert said.endswith(f"\n\nhint: {hint}\n"), ended.err
    assert ended.err.count("error: ") == 1
    assert ended.err.count("Traceback") == is_traced
    assert ("in stumble" in said) == is_traced


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("end", ["SIGKILL", "exception"])
def test_a_rank_that_dies_in_a_step_ends_the_run_with_its_name(run, tmp_path, axis, end):
    ended = run((), axis, end, saves=1)
    how = {
        "SIGKILL": "was ended by SIGKILL, as happens when memory runs out\n",
        "exception": "failed: KeyError: 'the saddle'\n\nTraceback (most recent call last):\n",
    }[end]
    saved = read_manifest(newest_checkpoint(tmp_path / "run")).step
    # It dies in step 3, beside the save of step 2, of which a kill leaves half.
    assert saved == 2 or (saved == 1 and end == "SIGKILL")
    hint = f"paceline train --resume {tmp_path / 'run'} goes on from step {saved}"
    assert_told(ended, f"rank 1 ({axis}=1) {how}", hint, is_traced=end == "exception")


def test_a_rank_that_exits_ends_the_run_with_its_code(run, tmp_path):
    ended = run((), "pp", "exit", saves=50)
    nothing = "no checkpoint is complete yet (checkpoint.interval_steps)"
    hint = f"paceline train --resume {tmp_path / 'run'} begins anew: {nothing}"
    message = "rank 1 (pp=1) has ended itself, with exit code 3\n"
    assert_told(ended, message, hint, is_traced=False)


def test_an_error_that_says_all_needs_no_traceback(run):
    ended = run((), "tp", "expected", saves=50)
    assert_told(ended, "rank 1 (tp=1): a flat tyre\n", "mend it", is_traced=False)


@pytest.mark.parametrize("end", ["SIGKILL", "exception", "expected"])
def test_under_torchrun_the_failing_rank_says_so_itself(run, end):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    torchrun += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    ended = run(torchrun, "pp", end, saves=50)
    assert ended.time_s < LIMIT_S
    assert ended.code == 1
    if end == "SIGKILL":  # which no rank survives to say
        assert "Signal 9 (SIGKILL)" in ended.err
        assert "rank      : 1 (local_rank: 1)" in ended.err
    elif end == "expected":
        assert "error: rank 1 (pp=1): a flat tyre\n\nhint: mend it\n" in ended.err
    else:
        assert "in stumble" in ended.err
        # torch puts the rank before each line; its agent then says it all again.
        assert re.search(r"KeyError: 'the saddle'\n.*on rank 1 \(pp=1\)\n", ended.err)
        assert "error: rank 0" not in ended.err  # it has only lost the other
