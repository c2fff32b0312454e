"""``paceline train --resume`` under another plan, from an older checkpoint, or from none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runs import MODEL, SMALL, TWO_RANKS, inside, paceline, step_losses, write_data

from paceline.checkpoint.manifest import complete_checkpoints
from paceline.plan.plan import Plan
from paceline.train.run import RunFolder

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

CONSTANT = ("--set", "optimizer.schedule.kind=constant", "--set", "optimizer.eps=1e-4")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch) -> None:
    """A cache that these tests share; one thread a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "resume-cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run of six steps on one rank, saved after every second."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "resume-cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        done = paceline(
            *("train", MODEL, "--data", data, "--out", str(out), "--steps", "6", *SMALL),
            *(*CONSTANT, "--set", "checkpoint.interval_steps=2"),
        )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_a_run_goes_on_under_one_plan_after_another(whole, data, tmp_path):
    """Two data ranks, then one rank, then two tensor ranks: the losses of one rank throughout."""
    out = tmp_path / "run"
    begun = ("train", MODEL, "--data", data, "--out", str(out), "--steps", "2", *SMALL, *CONSTANT)
    ways = [
        (*begun, *TWO_RANKS),
        ("train", "--resume", str(out), "--steps", "4", "--set", "mesh.dp_shard=1"),
        ("train", "--resume", str(out), "--steps", "6", "--plan", str(tmp_path / "tensor.toml")),
    ]
    base = Plan.from_toml(whole / "plan.toml")
    tensor = base.with_overrides(["mesh.tp=2", "optimizer.clip_norm=1.0"])
    (tmp_path / "tensor.toml").write_text(tensor.to_toml())
    for way in ways:
        done = paceline(*way)
        assert done.returncode == 0, done.stderr
    losses, expected = step_losses(out), step_losses(whole)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    # Sums in another order, in float32; eps keeps AdamW from amplifying them.
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], rel=1e-6)

    config, plan = RunFolder(out).read()
    assert (config.steps, plan) == (6, tensor)
    former = {n: Plan.from_toml(out / f"plan-until-step-{n}.toml").mesh for n in (2, 4)}
    assert [former[2].dp_shard, former[4].dp_shard, former[4].tp] == [2, 1, 1]


REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "what data stands on": (
        ("--set", "train.seed=3", "--set", "train.sequence_length=32"),
        (
            "2 problems in --set",
            "train.seed = 3: decides which tokens a step reads, and is 0 in this run",
            "train.sequence_length = 32: decides which tokens a step reads, and is 16 in this run",
            "leave it at 16, or begin a new run from an export",
        ),
    ),
    "what state stands on": (
        ("--set", "optimizer.name=sgd", "--set", "peft.method=lora"),
        (
            'peft.method = "lora": decides what the checkpoint holds, and is "none" in this run',
            'optimizer.name = "sgd": decides what the checkpoint holds, and is "adamw"',
        ),
    ),
    "a plan file's defaults": (
        ("--plan", "{tmp}/other.toml"),
        ("2 problems in {tmp}/other.toml", "train.sequence_length = 512", "train.tokens_per_step"),
    ),
    "a plan that is not sound": (
        ("--set", "mesh.dp_replicate=4"),
        ("must be a multiple of sequence_length x data ranks = 64",),
    ),
    "a plan that the model does not go with": (
        ("--set", "mesh.tp=99"),
        ("mesh.tp = 99", "exceeds the model's"),
    ),
    "other ranks": (("--nproc", "2"), ("needs 1 rank(s), but there are 2", "mesh.dp_shard = 2")),
    "another folder": (("--out", "{tmp}/out"), ("--resume does not go with --out",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_change_is_refused_and_nothing_is_written(
    monkeypatch, capsys, tmp_path, whole, case
):
    arguments, told = REFUSED[case]
    (tmp_path / "other.toml").write_text("[zero]\nstage = 0\n")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    resume = ("train", "--resume", str(whole), "--steps", "8")
    code, out, err = inside(monkeypatch, capsys, *resume, *given)
    assert (code, out) == (2, ""), err
    assert err.count("error:") == 1
    for text in told:
        assert text.format(tmp=tmp_path) in err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_learning_rate_may_change(monkeypatch, capsys, run):
    """The way out of a gradient that is not finite."""
    resume = ("train", "--resume", str(run / "checkpoints" / "step-4"), "--set", "optimizer.lr=0.5")
    code, _, err = inside(monkeypatch, capsys, *resume)
    assert code == 0, err
    assert "lr = 0.5" in (run / "plan.toml").read_text()
    losses = step_losses(run)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 5, 6]
    assert losses[-2] == losses[4]  # of weights that the other rate has not moved yet
    assert losses[-1] != losses[5]


def test_a_run_that_goes_back_puts_later_checkpoints_aside(monkeypatch, capsys, run):
    resume = ("train", "--resume", str(run / "checkpoints" / "step-2"), "--steps", "3")
    code, _, err = inside(monkeypatch, capsys, *resume)
    assert code == 0, err
    aside = "goes back to step 2: later checkpoints are put aside, as superseded-1-step-4, "
    assert aside + "superseded-1-step-6\n" in err
    names = [path.name for path in complete_checkpoints(run / "checkpoints")]
    assert names == ["step-2", "step-3"]
    assert RunFolder(run).read()[0].steps == 3
    assert not list(run.glob("plan-until-*"))  # the plan has not changed

    resume = ("train", "--resume", str(run), "--steps", "4")
    code, _, err = inside(monkeypatch, capsys, *resume)
    assert code == 0, err
    assert "steps 4 to 4" in err
    named = ("train", "--resume", str(run / "checkpoints" / "superseded-1-step-6"), "--steps", "7")
    code, _, err = inside(monkeypatch, capsys, *named)
    assert code == 0, err
    assert "steps 7 to 7" in err


def test_a_run_that_has_saved_nothing_begins_anew_in_its_folder(monkeypatch, capsys, whole, run):
    shutil.rmtree(run / "checkpoints")
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(run), "--steps", "2")
    assert code == 0, err
    assert "steps 1 to 2" in err
    assert step_losses(run) == [*step_losses(whole), *step_losses(whole)[:2]]
