"""How a rank has failed: what it leaves to its launcher, and which of several failures is told.

A rank that fails makes others fail: they lose it in the middle of a collective, or are ended by the
launcher. A user should read of the first alone: which rank, where it is on the mesh, and why.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch.distributed

from paceline.core.env import error_file
from paceline.core.errors import PacelineError, RankError
from paceline.dist.launch import is_spoken_for
from paceline.plan.mesh import MeshConfig

_KEY = "paceline"
# What gloo says of a rank that is gone, which has no exception type of its own.
_GONE = ("by peer", "Broken pipe", "pair closure", "Connection refused")
# Signals that are no cause: the launcher's own, and that of a library that has lost a peer.
_SECOND = (signal.SIGTERM, signal.SIGABRT)
# Longer than the launcher takes to notice: a rank that is gone is noticed before those it has left.
_NOTICE_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An exception that has ended a rank.

    Attributes:
        kind: ``expected`` is one that says all by itself, ``unexpected`` one that needs its
            traceback, ``lost`` one that another rank's end has caused.
        message: what happened.
        hint: the way out, if it is known.
        traceback: where.
        exit_code: of the rank.
        time_s: when, since the epoch.
        comes_again: whether another start would come to the same, as `RankError` has it.
    """

    kind: Literal["expected", "unexpected", "lost"]
    message: str
    hint: str
    traceback: str
    exit_code: int
    time_s: float
    comes_again: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """What an exception comes to."""
        is_expected = isinstance(error, PacelineError)
        # A rank that disagrees with others, or has lost them, may do otherwise the next time.
        comes_again = is_expected and not isinstance(error, RankError)
        named = f"{type(error).__name__}: {error}"
        return cls(
            kind="lost" if is_peer_gone(error) else "expected" if is_expected else "unexpected",
            message=error.message if isinstance(error, PacelineError) else named,
            hint=error.hint if isinstance(error, PacelineError) else "",
            traceback="".join(traceback.format_exception(error)),
            exit_code=error.exit_code if isinstance(error, PacelineError) else 1,
            time_s=time.time(),
            comes_again=comes_again,
        )

    def write(self, path: str) -> None:
        """Leaves it where the launcher looks; torchrun's agent too understands the form."""
        details = {"py_callstack": self.traceback, "timestamp": str(int(self.time_s))}
        message = {"message": self.message, "extraInfo": details}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message, _KEY: asdict(self)}, file)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Failure | None:
        """What a rank has left in its error file; None of another's form."""
        return cls(**data[_KEY]) if _KEY in data else None


class End(NamedTuple):
    """How a rank has ended that has not succeeded.

    Attributes:
        exit_code: of its process; minus the number of a signal.
        failure: what it has left, if anything.
    """

    exit_code: int
    failure: Failure | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it has ended of itself and left nothing."""
        return self.failure is None and -self.exit_code not in _SECOND


def is_peer_gone(error: Exception) -> bool:
    """Whether a collective failed because of another rank; gloo says so in its message alone."""
    is_backend = isinstance(error, torch.distributed.DistError)
    return is_backend or (type(error) is RuntimeError and any(s in str(error) for s in _GONE))


def hand_over(error: Exception) -> None:
    """Writes down what ends this rank where its launcher looks, if it has one.

    Does not return where our own launcher tells of it: the process ends at once, for what would be
    torn down could wait for ranks that are stuck.
    """
    failure, path = Failure.of(error), error_file()
    if path is not None:
        failure.write(path)
    if is_spoken_for():
        if failure.kind == "lost":
            time.sleep(_NOTICE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.exit_code)


def first_failure(ends: Mapping[int, End], mesh: MeshConfig) -> RankError:
    """The error that tells why a run has failed.

    Args:
        ends: of the ranks that have not succeeded, in the order in which they were noticed.
        mesh: of the run.
    """
    left = {rank: end.failure for rank, end in ends.items() if end.failure is not None}
    causes = {rank: failure for rank, failure in left.items() if failure.kind != "lost"}
    noticed = next(iter(ends))
    if silent := [rank for rank, end in ends.items() if end.is_silent]:
        return _silent_end(silent[0], ends[silent[0]].exit_code, mesh)
    if causes:
        return _told(causes, mesh)
    if left and (early := [rank for rank in range(mesh.num_ranks) if rank not in ends]):
        text = f"{mesh.name_rank(early[0])} has left the run before its end"
        return RankError(text, ranks=(early[0],))
    if noticed not in left:
        return _silent_end(noticed, ends[noticed].exit_code, mesh)
    return _told(left, mesh)


def _silent_end(rank: int, exit_code: int, mesh: MeshConfig) -> RankError:
    name = mesh.name_rank(rank)
    if exit_code >= 0:
        text = f"{name} has ended itself, with exit code {exit_code}"
        return RankError(text, ranks=(rank,))
    text = f"{name} was ended by {signal.Signals(-exit_code).name}"
    is_kill = -exit_code == signal.SIGKILL
    text = text + ", as happens when memory runs out" if is_kill else text
    return RankError(text, ranks=(rank,))


def _told(failures: Mapping[int, Failure], mesh: MeshConfig) -> RankError:
    """The first of them; of ranks that say the same, the first rank."""
    first = min(failures.values(), key=lambda failure: failure.time_s)
    rank = min(rank for rank, failure in failures.items() if failure.message == first.message)
    name, failure = mesh.name_rank(rank), failures[rank]
    text = {
        "expected": f"{name}: {failure.message}",
        "unexpected": f"{name} failed: {failure.message}\n\n{failure.traceback.rstrip()}",
        "lost": f"{name} has lost another rank: {failure.message}",
    }[failure.kind]
    return RankError(
        text,
        hint=failure.hint,
        exit_code=failure.exit_code,
        ranks=() if failure.kind == "lost" else (rank,),  # it was another that is gone
        comes_again=failure.comes_again,
    )
