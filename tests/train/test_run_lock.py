"""Two runs never write to one folder."""

from __future__ import annotations

import os
import signal

import pytest

from paceline.core.errors import RankError, UsageError
from paceline.dist.testing import run_ranks
from paceline.train.run import RunFolder

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]


def test_a_second_run_is_told_who_writes(tmp_path):
    folder = RunFolder(tmp_path)

    def try_it(_rank: int) -> tuple[str, str]:
        with pytest.raises(UsageError) as caught, folder.held():
            pass
        return caught.value.message, caught.value.hint

    with folder.held():
        ((message, hint),) = run_ranks(try_it, 1)
    assert message == f"the run in {tmp_path} is being written by another process, {os.getpid()}"
    assert hint.endswith(f"kill {os.getpid()}")
    with folder.held():  # free again
        pass


def test_a_kill_frees_the_folder(tmp_path):
    folder = RunFolder(tmp_path)

    def die(_rank: int) -> None:
        with folder.held():
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RankError, match="-9"):
        run_ranks(die, 1)
    with folder.held():
        pass
