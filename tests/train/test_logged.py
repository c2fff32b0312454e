"""How far a run has come, read while it is being written."""

from __future__ import annotations

import json

import pytest

from paceline.train.logged import LoggedSteps
from paceline.train.run import RunFolder

pytestmark = pytest.mark.cpu


def test_the_last_step_of_any_rank_counts_from_where_it_began(tmp_path):
    folder = RunFolder(tmp_path / "run")
    progress = LoggedSteps(folder)
    progress.begin()
    assert progress.last_step() is None

    def log(rank: int, *steps: int, end: str = "\n") -> None:
        folder.records(rank).parent.mkdir(parents=True, exist_ok=True)
        with folder.records(rank).open("a") as file:
            for step in steps:
                file.write(json.dumps({"kind": "step", "step": step}) + end)

    log(0, 1, 2)
    log(1, 1, 2, 3)
    (folder.records(0).parent / "supervisor.jsonl").write_text('{"kind": "step", "step": 99}\n')
    assert progress.last_step() == progress.last_step() == 3
    log(0, 7, end="")  # half a line, which the next writer cuts off
    assert progress.last_step() == 3

    progress.begin()
    assert progress.last_step() is None
    whole = folder.records(0).read_bytes()
    folder.records(0).write_bytes(whole[: whole.rfind(b"\n") + 1])
    with folder.records(0).open("a") as file:
        file.write(json.dumps({"kind": "run", "first_step": 2}) + "\n")
    assert progress.last_step() is None
    log(0, 2)
    assert progress.last_step() == 2
    assert LoggedSteps(folder).last_step() == 3  # of all that is there
