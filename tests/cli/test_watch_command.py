"""``paceline watch``: on rings that this process writes as two ranks would."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from paceline.dist.ring import Ring, ring_path
from paceline.plan.mesh import MeshConfig

pytestmark = [pytest.mark.ranks]

MESH = MeshConfig(pp=2)


@pytest.fixture
def paceline(tmp_path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "paceline", "watch", str(tmp_path), *arguments]
        environment = {**os.environ, "COLUMNS": "160"}
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, env=environment
        )

    return run


@pytest.fixture
def rings(tmp_path):
    """Two ranks in their fourth step: the first waits for the second."""
    made = [Ring(ring_path(tmp_path, rank), MESH, rank) for rank in range(2)]
    for ring in made:
        ring.begin_training()
    for step in range(1, 4):
        for ring in made:
            number = ring.enter("all-reduce", ("pp",), 8, "loss")
            ring.leaves(number)
            ring.finish_step(step)
    made[0].waits(made[0].enter_way("receive", "pp", (1, 0), 8, "gradients"))
    yield made
    for ring in made:
        ring.close("done")


@pytest.mark.usefixtures("rings")
def test_one_look_as_data(paceline):
    done = paceline("--once", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    first, second = found["ranks"]
    assert (first["rank"], first["coordinate"], first["pid"]) == (0, {"pp": 0}, os.getpid())
    assert (first["process"], first["state"], first["phase"]) == ("running", "running", "training")
    assert first["step"] == second["step"] == 3
    assert first["inside"] == "receive pp 1->0 gradients"
    assert second["inside"] == ""
    assert first["heartbeat_age_s"] < 30
    assert found["missing"] == []
    assert found["step_time_s"] > 0
    assert found["verdict"] is None


@pytest.mark.usefixtures("rings")
def test_one_look_as_a_table(paceline, tmp_path):
    verdict = {"time_s": 0.0, "kind": "hang", "ranks": [1], "evidence": "it never came"}
    (tmp_path / "watch" / "verdict.json").write_text(json.dumps(verdict))
    done = paceline("--once")
    assert done.returncode == 0, done.stderr
    assert "receive pp 1->0 gradients" in done.stdout
    assert "median step" in done.stdout
    assert "hang, rank(s) 1: it never came" in done.stdout


def test_the_table_ends_with_the_run(paceline, rings):
    for ring in rings:
        ring.close("done")
    done = paceline()
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def test_a_run_that_was_not_watched_says_so(paceline, tmp_path):
    done = paceline("--once")
    assert done.returncode == 2
    assert f"error: {tmp_path} has no rings: its ranks were not watched" in done.stderr
    assert "hint: set resilience.watch = true" in done.stderr


@pytest.mark.usefixtures("rings")
def test_data_is_of_one_look(paceline):
    done = paceline("--json")
    assert done.returncode == 2
    assert "--json goes with --once" in done.stderr
