"""``paceline train``: what it prints, how it refuses, and how it ends when it is made to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import (
    MODEL,
    SMALL,
    TWO_RANKS,
    all_end_within,
    assert_one_error,
    inside,
    is_running,
    paceline,
    step_losses,
    write_data,
)

from paceline.checkpoint.manifest import complete_checkpoints, read_manifest, verify_files
from paceline.core.record import read_records
from paceline.plan.plan import Plan
from paceline.train.job import _absolute
from paceline.train.run import RunFolder

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory, monkeypatch) -> None:
    """A cache that these tests share; one thread a process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "train-cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of three steps, saved at 2 and 3, and what its process said."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "train-cache"))
        done = paceline(
            *("train", MODEL, "--data", data, "--out", str(out), "--steps", "3", *SMALL),
            *("--set", "checkpoint.interval_steps=2", "--json"),
        )
    return out, done


def test_json_is_the_last_record_and_nothing_else(finished):
    out, done = finished
    assert done.returncode == 0, done.stderr
    (*_, last) = read_records(RunFolder(out).records(0), "step")
    assert json.loads(done.stdout) == last
    assert last["step"] == 3
    assert last.keys() >= {"step", "loss", "grad_norm", "tokens", "tokens_per_s", "time_s"}
    assert done.stderr.count("step ") == 3
    assert done.stderr.count("saved ") == 2


def test_a_run_folder_is_as_the_contract_says(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {
        "plan.toml",
        "run.toml",
        "model",
        "records",
        "checkpoints",
        ".writer",
    }
    plan = Plan.from_toml(out / "plan.toml")
    assert (plan.train.sequence_length, plan.train.tokens_per_step) == (16, 96)
    names = [path.name for path in complete_checkpoints(out / "checkpoints")]
    assert names == ["step-2", "step-3"]


def test_a_finished_run_goes_on_with_more_steps(finished, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    code, out, err = inside(
        monkeypatch, capsys, "train", "--resume", str(copy), "--steps", "5", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["step"] == 5
    assert [step for step, _ in step_losses(copy)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_can_be_named_from_where_it_is(finished, monkeypatch, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    monkeypatch.chdir(copy / "checkpoints")
    code, out, err = inside(monkeypatch, capsys, "train", "--resume", "step-2", "--json")
    assert code == 0, err
    assert json.loads(out)["step"] == 3
    assert step_losses(copy)[-1] == step_losses(copy)[-2] == (3, json.loads(out)["loss"])


# Refusals. Those that come late, by which time something has been started, are run as processes.

REFUSED: dict[str, tuple[tuple[str, ...], int, str, str]] = {
    "no such data": (("--data", "{tmp}/no.txt"), 2, "no.txt: no such file or folder", "a path"),
    "weight": (("--data", "{tmp}/no.txt=much"), 2, "'much' is not a weight", "write SRC=WEIGHT"),
    "small weight": (
        ("--data", "builtin:python-stdlib=1", "--data", "builtin:python-stdlib=1e-4"),
        2,
        "the weight 0.0001 is less than a share of 1 in 1000 rows",
        "a larger weight",
    ),
    "no such held-out data": (
        ("--eval-data", "{tmp}/no.txt"),
        2,
        "no.txt: no such file or folder",
        "a path",
    ),
    "unknown builtin": (
        ("--data", "builtin:stdlib"),
        2,
        "unknown built-in text",
        "did you mean builtin:python-stdlib?",
    ),
    "no text in a folder": (("--data", "{tmp}"), 2, "holds no text", "files ending in"),
    "unknown key": (("--set", "trian.seed=1"), 2, "trian = ", "did you mean train?"),
    "unknown inner key": (
        ("--set", "train.sede=1"),
        2,
        "train.sede = 1: unknown key",
        "did you mean seed?",
    ),
    "wrong type": (("--set", "train.seed=many"), 2, 'train.seed = "many": must be an integer', ""),
    "not an assignment": (
        ("--set", "train.seed"),
        2,
        "cannot read the assignment",
        "write a.b=value",
    ),
    "no such plan": (("--plan", "{tmp}/no.toml"), 2, "cannot read {tmp}/no.toml", ""),
    "ranks": (
        ("--nproc", "3", *TWO_RANKS),
        2,
        "needs 2 rank(s), but there are 3",
        "start 2 rank(s)",
    ),
    "too few ranks": (
        ("--nproc", "1", *TWO_RANKS),
        2,
        "needs 2 rank(s), but there are 1",
        "start 2",
    ),
    "tokens": (("--set", "train.tokens_per_step=17"), 2, "must be a multiple of", "use 16 or 32"),
    "context": (("--set", "train.sequence_length=9999"), 2, "train.sequence_length", ""),
    "not built": (
        ("--set", "serve.mesh.replicas=2"),
        2,
        "is not built in this version",
        "use 1",
    ),
    "unknown dtype": (("--dtype", "float8"), 2, "unknown dtype 'float8'", "one of float32"),
    "unknown device": (
        ("--device", "gpu", *TWO_RANKS),
        2,
        "unknown device 'gpu'",
        "one of auto, cpu, cuda",
    ),
    "unknown optimizer": (
        ("--set", "optimizer.name=adam"),
        2,
        "is no optimizer",
        "did you mean adamw?",
    ),
    "frozen": (
        ("--set", 'train.freeze=["layers.*"]'),
        2,
        "matches no parameter",
        "names look like",
    ),
    "no steps": (("--steps", "0"), 2, "--steps", "paceline train --help"),
    "unknown flag": (("--step", "3"), 2, "No such option: --step", "paceline train --help"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_one_error_with_a_hint(monkeypatch, capsys, tmp_path, data, case):
    arguments, expected_code, message, hint = REFUSED[case]
    arguments = tuple(argument.format(tmp=tmp_path) for argument in arguments)
    given = ("train", MODEL, "--data", data, "--out", str(tmp_path / "out"), *SMALL, *arguments)
    if "--data" in arguments:
        given = ("train", MODEL, "--out", str(tmp_path / "out"), *SMALL, *arguments)
    code, out, err = inside(monkeypatch, capsys, *given)
    assert (code, out) == (expected_code, ""), err
    assert not (tmp_path / "out").exists()
    if hint:
        assert_one_error(err, message.format(tmp=tmp_path), hint)
    else:
        assert err.count("error:") == 1
        assert message.format(tmp=tmp_path) in err
        assert "Traceback" not in err


def test_an_unknown_model_names_known_ones(monkeypatch, capsys, tmp_path, data):
    given = ("train", "random:lama:tiny", "--data", data, "--out", str(tmp_path / "out"))
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 2
    assert_one_error(err, "unknown model family 'lama'", "did you mean llama?")


@pytest.mark.parametrize("missing", ["MODEL", "--data", "--out"])
def test_what_is_missing_is_said(monkeypatch, capsys, tmp_path, data, missing):
    parts = {"MODEL": (MODEL,), "--data": ("--data", data), "--out": ("--out", str(tmp_path / "o"))}
    given = [argument for name, part in parts.items() if name != missing for argument in part]
    code, _, err = inside(monkeypatch, capsys, "train", *given)
    assert code == 2
    assert_one_error(err, "train needs MODEL, --data and --out", "paceline train MODEL --data SRC")


def test_a_folder_that_holds_a_run_is_refused(monkeypatch, capsys, finished, data):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    given = ("train", MODEL, "--data", data, "--out", str(finished[0]), *SMALL)
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 2
    assert_one_error(err, "holds a run already", f"paceline train --resume {finished[0]}")
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_a_folder_without_checkpoints_cannot_be_resumed(monkeypatch, capsys, tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(path))
        assert code == 2
        assert_one_error(err, "holds no run: it has no run.toml", "give a run folder")


def test_a_resumed_run_goes_on_as_it_began(monkeypatch, capsys, finished, data):
    given = ("train", MODEL, "--resume", str(finished[0]), "--data", data)
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 2
    assert_one_error(err, "--resume does not go with MODEL, --data\n", "a resumed run goes on")


def test_a_run_that_is_done_says_so(monkeypatch, capsys, finished):
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(finished[0]))
    assert code == 2
    assert_one_error(err, "is at step 3 of 3: done", "--steps with more than 3")


def test_a_truncated_model_is_named(monkeypatch, capsys, finished, data, tmp_path):
    model = tmp_path / "model"
    code, _, err = inside(
        monkeypatch, capsys, "checkpoint", "export", str(finished[0]), "-o", str(model)
    )
    assert code == 0, err
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    given = ("train", str(model), "--data", data, "--out", str(tmp_path / "out"), *SMALL)
    code, _, err = inside(monkeypatch, capsys, *given)
    assert code == 1
    assert_one_error(err, f"{weights} is not a whole safetensors file", "the file is truncated")
    assert not (tmp_path / "out").exists()


def spoil(checkpoint: Path) -> Path:
    """Flips a bit in the middle of a checkpoint's data."""
    file = sorted(checkpoint.glob("*.distcp"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    return file


def test_a_damaged_checkpoint_is_named_and_passed_over(monkeypatch, capsys, finished, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    newest = copy / "checkpoints" / "step-3"
    file = spoil(newest)
    damaged = f"{file} is damaged"
    for named in (("--resume", str(newest)), ("--resume", str(copy), "--from", str(newest))):
        done = paceline("train", *named, "--steps", "5")
        assert (done.returncode, done.stdout) == (1, "")
        hint = "the checkpoint is damaged: resume from an older"
        assert_one_error(done.stderr, damaged, hint)
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(copy), "--steps", "4")
    assert code == 0, err
    assert damaged in err
    assert "its checksum has changed: passed over\n" in err
    assert "steps 3 to 4" in err
    for left in complete_checkpoints(copy / "checkpoints"):
        spoil(left)
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(copy), "--steps", "5")
    assert code == 1
    assert_one_error(err, "none of 2 checkpoint(s) is whole", "mend one of them")


def test_a_broken_line_of_data_is_named(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good"}\n{"text": \n')
    given = ("train", MODEL, "--data", str(broken), "--out", str(tmp_path / "out"), *SMALL)
    code, out, err = inside(monkeypatch, capsys, *given)
    assert (code, out) == (1, "")
    assert_one_error(err, f"{broken}, line 2: not JSON: ", 'write {"text": "..."}')
    assert not (tmp_path / "out").exists()


# Data: chats, mixtures, held-out data.


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    pairs = [{"prompt": "a" * (n % 5), "completion": "b" * (n % 3)} for n in range(30)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def test_a_mixture_with_held_out_data_is_trained_and_resumed(
    monkeypatch, capsys, tmp_path, data, chats
):
    out = tmp_path / "run"
    sources = ("--data", f"{data}=3", "--data", f"{chats}=1", "--eval-data", chats)
    options = (*SMALL, "--set", "train.eval_interval_steps=2", "--json")
    given = ("train", MODEL, *sources, "--out", str(out), "--steps", "3", *options)
    code, printed, err = inside(monkeypatch, capsys, *given)
    assert code == 0, err
    (*_, last) = read_records(RunFolder(out).records(0), "step")
    evals = list(read_records(RunFolder(out).records(0), "eval"))
    assert [record["step"] for record in evals] == [0, 2, 3]
    final = {"eval_loss": evals[-1]["loss"], "eval_perplexity": evals[-1]["perplexity"]}
    assert json.loads(printed) == last | final
    assert err.count("held out, after step ") == 3

    resume = ("train", "--resume", str(out), "--steps", "4", "--json")
    code, printed, err = inside(monkeypatch, capsys, *resume)
    assert code == 0, err
    assert json.loads(printed)["step"] == 4
    assert json.loads(printed)["eval_loss"] < evals[0]["loss"]

    Path(chats).write_text(Path(chats).read_text().replace("bb", "cc"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", str(out), "--steps", "9")
    assert code == 2
    assert_one_error(err, f"{chats} has changed since the run began", "put it back as it was")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["1", "2"])
def test_a_long_example_is_refused_before_anything_is_written(monkeypatch, capsys, tmp_path, ranks):
    path = tmp_path / "long.jsonl"
    path.write_text('\n{"prompt": "a", "completion": "' + "b" * 20 + '"}\n')
    given = ("train", MODEL, "--data", str(path), "--out", str(tmp_path / "out"), *SMALL, *ranks)
    code, out, err = inside(monkeypatch, capsys, *given)
    assert (code, out) == (2, "")
    message = f"{path}, line 2: 22 tokens, more than train.sequence_length = 16"
    assert_one_error(err, message, "train.sequence_length of at least 22")
    assert not (tmp_path / "out").exists()


# Two ranks: the first to fail speaks, the others are silent.


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one rank sees it", "all ranks see it"])
def test_ranks_that_fail_give_one_error(tmp_path, case):
    broken = tmp_path / "broken.jsonl"
    content, code, message = {
        "one rank sees it": ("{", 1, f"{broken}, line 1: not JSON: "),
        "all ranks see it": ('{"text": "short"}', 2, "fewer than one sequence of 16 + 1"),
    }[case]
    broken.write_text(content)
    given = ("train", MODEL, "--data", str(broken), "--out", str(tmp_path / "out"))
    done = paceline(*given, *SMALL, *TWO_RANKS, "--json")
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert_one_error(done.stderr, message)


# Ends


class Running:
    """A run in a session of its own, as if at a terminal, that saves at every step."""

    def __init__(self, data: str, out: Path, *arguments: str) -> None:
        command = [
            sys.executable,
            "-m",
            "paceline",
            "train",
            MODEL,
            "--data",
            data,
            "--out",
            str(out),
        ]
        command += ["--steps", "100000", *SMALL, "--set", "checkpoint.interval_steps=1"]
        command += ["--set", "checkpoint.keep=2", *arguments]
        self.checkpoints = out / "checkpoints"
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A runner in the background has SIGINT ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        self.seen = ""

    def wait_for(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.seen += line
            if text in line:
                return
        raise AssertionError(f"{text!r} was never said:\n{self.seen}")

    def rest(self, limit_s: float = 30.0) -> str:
        """What it still says until it and all who hold its stderr have ended."""
        out, err = self.process.communicate(timeout=limit_s)
        assert out == ""
        return err

    def ranks(self) -> list[int]:
        """The processes that it has started and that have not ended."""
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                lines = dict(line.split(":\t", 1) for line in status.read_text().splitlines())
            except (OSError, ValueError):
                continue  # it has just ended
            if int(lines["PPid"]) == self.process.pid:
                found.append(int(lines["Pid"]))
        return found


@pytest.fixture
def start(data, tmp_path) -> Iterator[Any]:
    started: list[Running] = []

    def run(*arguments: str) -> Running:
        started.append(Running(data, tmp_path / f"run-{len(started)}", *arguments))
        return started[-1]

    yield run
    for running in started:
        pids = running.ranks()
        running.process.kill()
        running.process.communicate()
        for pid in filter(is_running, pids):
            os.kill(pid, signal.SIGKILL)


def assert_whole(checkpoints: Path) -> int:
    """All that passes for a checkpoint is one; the newest step."""
    complete = complete_checkpoints(checkpoints)
    for path in complete:
        verify_files(path, read_manifest(path))
    return read_manifest(complete[-1]).step


def test_an_interrupt_ends_a_run_with_one_line(start):
    running = start()
    running.wait_for("saved")
    running.wait_for("step 3/")
    time.sleep(0.1)
    running.process.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    err = running.rest()
    assert time.monotonic() - start_s < 5
    assert running.process.returncode == 130
    assert err.rstrip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    assert assert_whole(running.checkpoints) >= 2


def test_an_interrupt_before_the_first_step_is_as_quiet(start):
    running = start()
    maps = Path(f"/proc/{running.process.pid}/maps")
    while "libtorch" not in maps.read_text():
        time.sleep(0.01)  # it comes to what takes longest, the import of torch
    running.process.send_signal(signal.SIGINT)
    err = running.rest()
    assert running.process.returncode == 130
    assert err == "error: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["ctrl-c", "kill -INT"])
def test_an_interrupt_ends_ranks_with_one_line(start, to_all):
    running = start(*TWO_RANKS)
    running.wait_for("saved")
    ranks = running.ranks()
    assert len(ranks) == 2
    running.wait_for("step 3/")
    time.sleep(0.1)
    if to_all:
        os.killpg(running.process.pid, signal.SIGINT)
    else:
        running.process.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    err = running.rest()
    assert time.monotonic() - start_s < 8
    assert running.process.returncode == 130
    assert err.count("error:") == 1
    assert err.rstrip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    assert all_end_within(ranks, 3)
    assert assert_whole(running.checkpoints) >= 2


SUPERVISED = ("--set", "resilience.on_failure=restart", "--set", "resilience.max_restarts=3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code"),
    [((), -signal.SIGTERM), (TWO_RANKS, 143), (SUPERVISED, 143)],
    ids=["1", "2", "supervised"],
)
def test_a_termination_ends_a_run_and_loses_nothing_that_was_saved(start, more, code):
    """As schedulers end runs: nobody starts the ranks again."""
    running = start(*more)
    running.wait_for("saved")
    ranks = running.ranks()
    running.wait_for("step 3/")
    running.process.terminate()
    err = running.rest()
    assert running.process.returncode == code
    assert "Traceback" not in err
    assert "restart " not in err
    assert all_end_within(ranks, 3)
    assert assert_whole(running.checkpoints) >= 2


@pytest.mark.slow
def test_a_killed_run_leaves_no_orphans_and_goes_on_to_the_same_losses(start):
    running = start(
        *TWO_RANKS,
        *("--set", "checkpoint.interval_steps=3", "--set", "optimizer.schedule.kind=constant"),
    )
    running.wait_for("step 5/")
    ranks = running.ranks()
    assert len(ranks) == 2
    running.process.kill()
    assert all_end_within(ranks, 5)
    assert "Traceback" not in running.rest()
    assert_whole(running.checkpoints)
    oldest, folder = complete_checkpoints(running.checkpoints)[0], running.checkpoints.parent
    saved, before = read_manifest(oldest).step, step_losses(folder)
    assert len(before) > saved

    steps = str(len(before) + 1)
    again = paceline("train", "--resume", str(oldest), "--steps", steps, "--nproc", "2")
    assert again.returncode == 0, again.stderr
    after = step_losses(folder)[len(before) :]
    assert [step for step, _ in after] == list(range(saved + 1, int(steps) + 1))
    assert after[:-1] == before[saved:]  # the steps that were taken twice: the same bits


@pytest.mark.slow
def test_a_run_that_is_killed_as_its_ranks_start_leaves_no_orphans(start):
    running = start(*TWO_RANKS)
    while len(ranks := running.ranks()) < 2:
        time.sleep(0.01)
    running.process.kill()
    assert all_end_within(ranks, 5)
    assert "Traceback" not in running.rest()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_name(start):
    running = start(*TWO_RANKS)
    running.wait_for("step 3/")
    ranks = running.ranks()
    os.kill(max(ranks), signal.SIGKILL)
    err = running.rest()
    assert running.process.returncode == 1
    assert "was ended by SIGKILL" in err
    assert "hint: paceline train --resume" in err
    assert "Traceback" not in err
    assert all_end_within(ranks, 3)
    assert assert_whole(running.checkpoints) >= 2


@pytest.mark.slow
def test_two_agents_train_as_one_process_does(data, tmp_path):
    """torchrun --nnodes 2 over loopback: the command that several machines run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = ("train", MODEL, "--data", data, "--steps", "6", *SMALL, "--set", "train.pack=false")
    agents = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
                *("--node-rank", str(node), "--nproc-per-node", "1", "--rdzv-backend", "c10d"),
                *("--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "paceline", *given),
                *("--out", str(tmp_path / "two"), *TWO_RANKS, "--json"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=180) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    (record,) = [json.loads(out) for out, _ in said if out]  # the first rank alone
    alone = paceline(*given, "--out", str(tmp_path / "one"), "--json")
    assert alone.returncode == 0, alone.stderr
    losses = [[loss for _, loss in step_losses(tmp_path / name)] for name in ("one", "two")]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert record["loss"] == losses[1][-1]
    assert record["loss"] == pytest.approx(json.loads(alone.stdout)["loss"], rel=1e-6)


def test_a_run_begun_with_relative_paths_goes_on_from_any_folder(monkeypatch, capsys, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.txt").write_text("a line of text, again and again. " * 40)
    monkeypatch.chdir(tmp_path / "texts")
    sizes = ("--set", "train.sequence_length=16", "--set", "train.tokens_per_step=32")
    begun = ("train", MODEL, "--data", "text.txt", "--steps", "1", "--out", "../run", *sizes)
    assert inside(monkeypatch, capsys, *begun)[0] == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = inside(monkeypatch, capsys, "train", "--resume", "run", "--steps", "2")
    assert code == 0, err


def test_a_known_name_is_not_taken_for_a_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "mine").mkdir()
    assert _absolute("smollm2-135m") == "smollm2-135m"
    assert _absolute("mine") == str((tmp_path / "mine").resolve())
