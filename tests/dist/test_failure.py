"""Which of several failures is told, and how."""

from __future__ import annotations

import json
import signal

import pytest
import torch.distributed

from paceline.core.errors import DataError, RankError, UsageError
from paceline.dist.failure import End, Failure, first_failure, hand_over, is_peer_gone
from paceline.plan.mesh import MeshConfig

pytestmark = pytest.mark.cpu

TERM, KILL, ABORT = -signal.SIGTERM, -signal.SIGKILL, -signal.SIGABRT
MESH = MeshConfig(pp=2, dp_shard=2)
LOST = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def left(error: Exception, time_s: float, exit_code: int = 1) -> End:
    try:
        raise error
    except type(error) as caught:
        failure = Failure.of(caught)
    data = {"time_s": time_s} | {
        name: getattr(failure, name)
        for name in ("kind", "message", "hint", "traceback", "exit_code", "comes_again")
    }
    return End(exit_code, Failure(**data))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        # What dies without a word is told before what others say of it,
        ({1: End(KILL), 0: left(LOST, 1.0)}, "rank 1 (pp=0 dp_shard=1) was ended by SIGKILL"),
        ({0: left(ValueError("odd"), 1.0), 3: End(KILL)}, "rank 3 (pp=1 dp_shard=1) was ended by"),
        ({2: End(3), 0: End(TERM)}, "rank 2 (pp=1 dp_shard=0) has ended itself, with exit code 3"),
        ({2: End(-signal.SIGSEGV), 0: End(TERM)}, "rank 2 (pp=1 dp_shard=0) was ended by SIGSEGV"),
        # an error before the loss of a rank, the first error before others,
        ({0: left(LOST, 1.0), 1: left(KeyError("k"), 2.0)}, "rank 1 (pp=0 dp_shard=1) failed: Key"),
        (
            {0: left(KeyError("b"), 2.0), 1: left(KeyError("a"), 1.0)},
            "rank 1 (pp=0 dp_shard=1) fai",
        ),
        (
            {1: left(DataError("x"), 1.0), 0: left(DataError("x"), 2.0)},
            "rank 0 (pp=0 dp_shard=0): x",
        ),
        # what a library does that has lost a rank after all of these,
        ({0: End(ABORT), 1: left(KeyError("k"), 1.0)}, "rank 1 (pp=0 dp_shard=1) failed: KeyError"),
        ({0: End(ABORT), 1: End(TERM)}, "rank 0 (pp=0 dp_shard=0) was ended by SIGABRT"),
        # and what the launcher ends is no cause, unless it was noticed first.
        (
            {1: End(TERM), 0: left(LOST, 1.0), 2: End(TERM), 3: End(TERM)},
            "rank 1 (pp=0 dp_shard=1)",
        ),
        (
            {0: left(LOST, 1.0), 1: End(TERM), 2: End(TERM), 3: End(TERM)},
            "rank 0 (pp=0 dp_shard=0)",
        ),
        ({0: left(LOST, 1.0), 1: End(TERM), 2: End(TERM)}, "rank 3 (pp=1 dp_shard=1) has left the"),
    ],
)
def test_the_first_failure_is_told(ends, expected):
    assert first_failure(ends, MESH).message.startswith(expected)


def test_an_error_keeps_its_hint_and_exit_code_and_only_a_surprise_its_traceback():
    told = first_failure({0: left(UsageError("no", hint="yes"), 1.0, 2), 1: End(TERM)}, MESH)
    assert (told.message, told.hint) == ("rank 0 (pp=0 dp_shard=0): no", "yes")
    assert told.exit_code == 2
    told = first_failure({0: left(ZeroDivisionError("by none"), 1.0), 1: End(TERM)}, MESH)
    first, rest = told.message.split("\n\n", 1)
    assert first == "rank 0 (pp=0 dp_shard=0) failed: ZeroDivisionError: by none"
    assert rest.startswith("Traceback (most recent call last):\n")
    assert "in left" in rest
    assert (told.hint, told.exit_code) == ("", 1)


@pytest.mark.parametrize(
    ("error", "is_gone"),
    [
        (LOST, True),
        (RuntimeError("writev [::1]:1: Broken pipe"), True),
        (torch.distributed.DistNetworkError("gone"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # a download's, not a rank's
        (RankError("closed by peer"), False),
    ],
)
def test_the_loss_of_a_rank_is_told_from_other_errors(error, is_gone):
    assert is_peer_gone(error) == is_gone


def test_what_a_rank_leaves_is_read_by_its_launcher_and_by_torchruns(tmp_path, monkeypatch):
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    hand_over(DataError("broken", hint="mend it"))
    failure = torch.distributed.elastic.multiprocessing.errors.ProcessFailure(0, 1, 1, str(path))
    assert failure.message["message"] == "broken"
    found = Failure.read(json.loads(path.read_text()))
    assert found is not None
    assert (found.kind, found.message, found.hint) == ("expected", "broken", "mend it")
    assert int(found.time_s) == failure.timestamp
    assert Failure.read({"message": "torch's own"}) is None


def test_nothing_is_left_where_nobody_looks(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    hand_over(DataError("broken"))  # and this process goes on
