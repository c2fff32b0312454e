"""Of several checkpoints the first that is whole is used, and those before it are told."""

from __future__ import annotations

import hashlib

import pytest

from paceline.checkpoint.levels import candidates, level_folder
from paceline.checkpoint.manifest import FileEntry, Manifest
from paceline.checkpoint.newest import newest_whole
from paceline.core.errors import DataError

pytestmark = pytest.mark.cpu


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 2 and 4 on two levels."""
    levels = (str(tmp_path / "near"), "disk")
    for level in levels:
        for step in (2, 4):
            folder = level_folder(tmp_path / "run", level) / f"step-{step}"
            folder.mkdir(parents=True)
            (folder / "data").write_bytes(b"pace")
            entry = FileEntry(4, hashlib.sha256(b"pace").hexdigest())
            Manifest(
                step=step, versions={}, plan={}, model={}, files={"data": entry}, tensors={}
            ).commit(folder)
    return candidates(tmp_path / "run", levels)


def test_what_is_damaged_is_passed_over_step_by_step_and_level_by_level(run):
    for number, damage in enumerate((None, b"pacf", b"pac", b"")):
        if damage is not None:
            (run[number - 1].path / "data").write_bytes(damage)
        told: list[str] = []
        assert newest_whole(run, lambda path, _, told=told: told.append(path)) == run[number].path
        assert told == [candidate.path for candidate in run[:number]]
    assert [(c.step, c.level == "disk") for c in run] == [
        (4, False),
        (4, True),
        (2, False),
        (2, True),
    ]


def test_where_none_is_whole_the_run_cannot_go_on(run):
    (run[0].path / "data").unlink()
    for candidate in run[1:]:
        (candidate.path / "manifest.json").write_text("{}")
    told: list[str] = []
    with pytest.raises(DataError, match=r"none of 4 checkpoint\(s\) is whole"):
        newest_whole(run, lambda _, why: told.append(why))
    assert len(told) == 4
    assert "has 0 bytes, not 4" in told[0]


def test_where_there_is_none_nothing_is_said():
    assert newest_whole([], lambda *_: pytest.fail("of what?")) is None
