"""Checkpoints that a run goes back behind are kept, under names that no reader takes for one."""

from __future__ import annotations

import pytest

from paceline.checkpoint.manifest import Manifest, complete_checkpoints, newest_checkpoint
from paceline.checkpoint.set_aside import set_aside_after

pytestmark = pytest.mark.cpu


def save(folder, *steps):
    for step in steps:
        (folder / f"step-{step}").mkdir(parents=True)
        Manifest(step, {}, {}, {}, {}, {}).commit(folder / f"step-{step}")


def test_later_ones_are_put_aside_and_can_still_be_named(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 2, 4, 10)
    (folder / "step-12").mkdir()  # half of one
    assert [path.name for path in set_aside_after(folder, 2)] == [
        "superseded-1-step-4",
        "superseded-1-step-10",
    ]
    assert [path.name for path in complete_checkpoints(folder)] == ["step-2"]
    assert (folder / "step-12").is_dir()
    assert newest_checkpoint(tmp_path).name == "step-2"
    named = folder / "superseded-1-step-10"
    assert newest_checkpoint(named) == named

    save(folder, 4)
    assert [path.name for path in set_aside_after(folder, 3)] == ["superseded-2-step-4"]
    assert set_aside_after(folder, 2) == []
    assert set_aside_after(tmp_path / "none", 0) == []
