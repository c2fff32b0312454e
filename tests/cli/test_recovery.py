"""Runs that mend themselves: ranks that are killed, stopped or fail, and what the run does then."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from runs import MODEL, assert_one_error, inside, step_losses, write_data

from paceline.core.record import read_records
from paceline.plan.plan import Plan
from paceline.train.run import RunFolder

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

LIMIT_S = 30.0
STEPS = 9
SIZES = ("train.sequence_length=16", "train.tokens_per_step=192")  # 12 sequences
# Saved step by step, so that it is known which step a run goes on from.
SAME = (
    "optimizer.schedule.kind=constant",
    "optimizer.eps=1e-4",
    "checkpoint.interval_steps=2",
    "checkpoint.method=blocking",
)
# Python reads it as it starts. Before its step STEP rank RANK comes to grief: once for each step
# that is listed, or each time.
FAULT = """
import os, signal, time
from pathlib import Path
if os.environ.get("RANK") == "{rank}":
    from paceline.core.errors import DataError
    from paceline.train import trainer
    whole, folder = trainer.train_step, Path({folder!r})
    def spoil(step):
        file = next((folder.parent / "run" / "checkpoints" / f"step-{{step}}").glob("*.distcp"))
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    def step(state, *given, **named):
        mark = folder / f"died-{{state.step + 1}}"
        if state.step + 1 in {steps} and ({always} or not mark.exists()):
            mark.write_text(str(time.time()))
            {how}
        return whole(state, *given, **named)
    trainer.train_step = step
"""
KILL, STOP = (f"os.kill(os.getpid(), signal.SIG{name})" for name in ("KILL", "STOP"))


class Ended(NamedTuple):
    """A run: its exit code, its stderr, when it had first recovered, and what it has logged."""

    code: int
    err: str
    recovered_s: float
    losses: list[tuple[int, float]]
    records: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch) -> None:
    """A cache that these tests share; one thread a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "recovery-cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arguments(data: str, out: Path, *settings: str) -> list[str]:
    given = ["train", MODEL, "--data", data, "--out", str(out), "--steps", str(STEPS)]
    return given + [part for key in (*SIZES, *SAME, *settings) for part in ("--set", key)]


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Trains with a fault."""

    def start(
        *settings: str,
        rank: int = 0,
        steps: tuple[int, ...] = (6,),
        always: bool = False,
        how: str = KILL,
    ) -> Ended:
        folder, out = tmp_path / "faults", tmp_path / "run"
        folder.mkdir()
        fault = FAULT.format(rank=rank, folder=str(folder), steps=steps, always=always, how=how)
        (folder / "sitecustomize.py").write_text(fault)
        paths = [str(folder), *sys.path]
        monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, paths)))
        command = [sys.executable, "-m", "paceline", *arguments(data, out, *settings)]
        err, recovered_s = "", 0.0
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                err += line
                if "s after the failure" in line:
                    recovered_s = recovered_s or time.time()
        code = process.returncode
        log = RunFolder(out).supervisor_records
        records = list(read_records(log)) if log.exists() else []
        died = [float(mark.read_text()) for mark in sorted(folder.glob("died-*"))]
        assert died, err
        return Ended(code, err, recovered_s - died[0], step_losses(out), records)

    return start


@pytest.fixture(scope="module")
def expected(data, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a run on one rank to which nothing happens."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    command = [sys.executable, "-m", "paceline", *arguments(data, out)]
    subprocess.run(command, check=True, capture_output=True)
    return step_losses(out)


def assert_same_steps(ended: Ended, expected: list[tuple[int, float]], resumed: int) -> None:
    """Every step that counts, and every one that was taken twice, has the loss that it should."""
    assert ended.code == 0, ended.err
    steps = [step for step, _ in ended.losses]
    assert steps == [*range(1, 6), *range(resumed + 1, STEPS + 1)], ended.err
    should = [dict(expected)[step] for step in steps]
    # Sums over ranks in another order, in float32; eps keeps AdamW from amplifying them.
    assert [loss for _, loss in ended.losses] == pytest.approx(should, rel=1e-6)


def restart(*more: str, way: str = "restart", most: int = 3) -> tuple[str, ...]:
    return (f"resilience.on_failure={way}", f"resilience.max_restarts={most}", *more)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_the_run_comes_to_the_same(run, expected):
    ended = run(*restart("mesh.dp_shard=4"), rank=2)
    assert_same_steps(ended, expected, resumed=4)
    assert ended.recovered_s < LIMIT_S
    (restarted,), (recovered,) = ended.of("restart"), ended.of("recovered")
    assert restarted["why"].startswith("rank 2 (dp_shard=2) was ended by SIGKILL")
    assert (restarted["ranks"], restarted["changes"]) == ([2], {})
    keys = ("restart", "failed_step", "resumed_step", "num_lost_steps", "num_ranks")
    assert [restarted[key] for key in keys] == [1, 5, 4, 1, 4]
    assert recovered["step"] >= 5
    assert 0 < recovered["time_s"] < LIMIT_S
    assert "restart 1 of at most 3, from step 4 on 4 rank(s)\n" in ended.err
    assert "error:" not in ended.err


@pytest.mark.slow
def test_a_stopped_rank_is_found_and_replaced(run, expected):
    settings = ("mesh.tp=2", "mesh.dp_replicate=2", "resilience.watch=true")
    ended = run(*restart(*settings), rank=3, how=STOP)
    assert_same_steps(ended, expected, resumed=4)
    assert ended.recovered_s < LIMIT_S
    (restarted,), (verdict,) = ended.of("restart"), ended.of("verdict")
    assert restarted["why"].startswith("rank 3 (dp_replicate=1 tp=1) hangs: ")
    assert "stopped" in restarted["why"]
    assert (verdict["verdict"], verdict["ranks"]) == ("hang", [3])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "num_left"), [((), 3), (("dp_shard=2", "tp=2"), 2)], ids=["rule", "plan"]
)
def test_a_run_shrinks_and_comes_to_the_same(run, expected, tmp_path, given, num_left):
    settings = restart("mesh.dp_replicate=4", way="shrink")
    if given:
        base = Plan().with_overrides([*SIZES, *SAME])
        for name in given:
            (tmp_path / f"{name}.toml").write_text(base.with_overrides([f"mesh.{name}"]).to_toml())
        big = Plan(mesh={"tp": 4}, train=base.train)  # of too many ranks
        (tmp_path / "big.toml").write_text(big.to_toml())
        paths = [str(tmp_path / f"{name}.toml") for name in ("big", "tp=2", "dp_shard=2")]
        settings = (*settings, f"resilience.shrink_plans={json.dumps(paths)}")
    ended = run(*settings, rank=1)
    assert_same_steps(ended, expected, resumed=4)
    (restarted,) = ended.of("restart")
    assert restarted["num_ranks"] == num_left
    changes = {"mesh.dp_replicate": 1, "mesh.tp": 2} if given else {"mesh.dp_replicate": 3}
    assert restarted["changes"] == changes
    plan = RunFolder(tmp_path / "run").read()[1]
    assert (plan.mesh.num_ranks, plan.resilience.on_failure) == (num_left, "shrink")
    assert Plan.from_toml(tmp_path / "run" / "plan-until-step-4.toml").mesh.dp_replicate == 4


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(run, expected, tmp_path):
    ended = run(*restart("mesh.dp_shard=2"), how=f"spoil(4); {KILL}")
    assert_same_steps(ended, expected, resumed=2)
    (damaged,) = ended.of("damaged")
    assert damaged["path"] == str(tmp_path / "run" / "checkpoints" / "step-4")
    assert "step-4" in damaged["why"]
    assert ended.of("restart")[0]["num_lost_steps"] == 3
    assert f"{damaged['why']}: passed over\n" in ended.err
    assert (tmp_path / "run" / "checkpoints" / "superseded-1-step-4").is_dir()


@pytest.mark.slow
def test_one_rank_is_started_again_even_before_it_has_saved(run, expected):
    ended = run(*restart("checkpoint.interval_steps=20"))
    assert ended.code == 0, ended.err
    assert ended.losses == expected[:5] + expected
    assert ended.of("restart")[0]["resumed_step"] == 0


@pytest.mark.slow
def test_a_failure_that_comes_again_and_again_ends_the_run(run):
    ended = run(*restart(most=9), always=True)
    assert ended.code == 1
    message = "rank 0 was ended by SIGKILL, as happens when memory runs out; it has come to this 3 "
    assert_one_error(ended.err, message + "times one after the other", "paceline train --resume")
    assert [record["resumed_step"] for record in ended.of("restart")] == [4, 4]


@pytest.mark.slow
def test_a_run_is_restarted_so_many_times_and_no_more(run):
    ended = run(*restart(most=1), steps=(3, 6))
    assert ended.code == 1
    reason = "it has been restarted 1 time(s) (resilience.max_restarts)"
    assert_one_error(ended.err, reason, "paceline train --resume")
    assert [record["resumed_step"] for record in ended.of("restart")] == [2]


@pytest.mark.slow
def test_what_would_come_again_is_told_at_once(run):
    how = 'raise DataError("a flat tyre", hint="mend it")'
    ended = run(*restart("mesh.dp_shard=2"), rank=1, how=how)
    assert ended.code == 1
    message = "rank 1 (dp_shard=1): a flat tyre; another start would come to the same\n"
    assert_one_error(ended.err, message, "mend it")
    assert ended.records == []


@pytest.mark.slow
def test_a_hang_ends_a_run_that_is_to_stop(run):
    ended = run("mesh.dp_shard=2", "resilience.watch=true", rank=1, how=STOP)
    assert ended.code == 1
    hint = "paceline train --resume"
    assert_one_error(ended.err, "error: rank 1 (dp_shard=1) hangs: ", hint)
    assert "SIGKILL" not in ended.err
    assert [record["kind"] for record in ended.records] == ["verdict"]


def test_restarts_are_refused_where_another_launcher_starts_ranks(
    monkeypatch, capsys, data, tmp_path
):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("paceline.dist.launch.follow_launcher", lambda: None)
    given = arguments(data, tmp_path / "out", *restart())
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 2
    message = "resilience.on_failure = restart is for ranks that paceline train has started"
    assert_one_error(err, message, "run paceline train without torchrun")
    assert not (tmp_path / "out").exists()


def test_a_smaller_plan_that_the_run_cannot_go_on_under_is_refused_at_once(
    monkeypatch, capsys, data, tmp_path
):
    (tmp_path / "other.toml").write_text("[train]\nseed = 3\n")
    shrinks = restart(f"resilience.shrink_plans=['{tmp_path}/other.toml']", way="shrink")
    given = arguments(data, tmp_path / "out", *shrinks, "mesh.dp_shard=2")
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 2
    assert f"problems in {tmp_path}/other.toml" in err
    assert "train.seed = 3: decides which tokens a step reads, and is 0 in this run" in err
    assert not (tmp_path / "out").exists()
