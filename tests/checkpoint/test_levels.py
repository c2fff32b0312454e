from __future__ import annotations

from pathlib import Path

import pytest

from paceline.checkpoint.levels import Candidate, candidates, level_folder, memory_folder


def put(folder: Path, step: int, *, is_complete: bool = True) -> Path:
    """A folder that looks like a checkpoint."""
    path = folder / f"step-{step}"
    path.mkdir(parents=True)
    if is_complete:
        (path / "manifest.json").touch()
    return path


def test_candidates_are_the_newest_first_and_the_fastest_level_first(tmp_path):
    run, other = tmp_path / "run", str(tmp_path / "other")
    levels = (other, "disk")
    far, near = level_folder(run, other), level_folder(run, "disk")
    assert near == run / "checkpoints"
    put(near, 9)
    put(near, 10)
    put(far, 10)
    put(far, 100, is_complete=False)
    put(far, 11)
    put(far, 2)
    assert candidates(run, levels) == [
        Candidate(11, other, far / "step-11"),
        Candidate(10, other, far / "step-10"),
        Candidate(10, "disk", near / "step-10"),
        Candidate(9, "disk", near / "step-9"),
        Candidate(2, other, far / "step-2"),
    ]
    assert [found.level for found in candidates(run, ("disk", other))[1:3]] == ["disk", other]
    assert candidates(tmp_path / "none", levels) == []


@pytest.mark.parametrize("level", ["memory", "elsewhere"])
def test_runs_share_no_level(tmp_path, monkeypatch, level):
    monkeypatch.chdir(tmp_path)
    one, two = Path("a/run"), Path("b/run")
    folders = {level_folder(run, level) for run in (one, two, one.resolve())}
    assert len(folders) == 2


def test_the_memory_level_is_of_this_machine(tmp_path):
    assert level_folder(tmp_path, "memory").parent == memory_folder(tmp_path)
    assert memory_folder(tmp_path).parent == Path("/dev/shm")
