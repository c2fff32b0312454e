"""The processes of an engine's ranks: started, spoken to, and ended together."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from paceline.core.env import child_environment
from paceline.core.errors import DataError
from paceline.plan.mesh import MeshConfig
from paceline.serve.executor.base import ExecutorLostError
from paceline.serve.executor.messages import FROM_RANKS, TO_RANKS, Begin, Done, Job, Ready, Step
from paceline.serve.executor.wire import Line
from paceline.serve.executor.worker import LOST_PEER

START_S = 600.0
"""That all ranks have to load their parts and to meet."""
_SETTLE_S = 0.5  # that the others have to end of themselves once one is gone
_POLL_S = 0.02
_NUM_LINES = 20
_SECOND = (None, LOST_PEER, -signal.SIGABRT)  # ends that are no cause


class Process(Protocol):
    """A rank's process, as `subprocess.Popen` tells of it."""

    pid: int

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


Start = Callable[[socket.socket, Path, Job], Process]
"""Starts a process that runs `paceline.serve.executor.worker.main` on its end of a connection.

What it prints goes to a file.
"""

_RANK = "from paceline.serve.executor.worker import main; main({descriptor}, {controller})"


def spawn(connection: socket.socket, log: Path, job: Job) -> Process:
    """Starts a rank in a new interpreter: nothing of this one's threads or memory is in it."""
    descriptor = connection.fileno()
    defaults = {"OMP_NUM_THREADS": str(job.num_threads)}
    if sys.platform == "linux":
        # Gloo asks nobody who connects to it: other machines have no way to.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", _RANK.format(descriptor=descriptor, controller=os.getpid())],
            env=child_environment(**defaults),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=(descriptor,),
        )


class Workers:
    """One process a rank. They end when this is closed, dropped, or its process is gone.

    Args:
        job: that they compute.
        start: starts a process.

    Raises:
        ExecutorLostError: a rank cannot begin.
    """

    def __init__(self, job: Job, start: Start = spawn) -> None:
        self._mesh = MeshConfig(pp=job.pp, tp=job.tp)
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-ranks-")
        self._lines: list[Line] = []
        self.processes: list[Process] = []
        self._selector = selectors.DefaultSelector()
        self._end = weakref.finalize(
            self, _end, self.processes, self._lines, self._selector, self._folder
        )
        self._steps_done = [0] * self._mesh.num_ranks
        try:
            self._start(job, start)
        except BaseException:
            self._end()
            raise

    def send(self, step: Step, timeout_s: float) -> None:
        """Gives all ranks a step.

        Raises:
            ExecutorLostError: a rank is gone, or takes nothing.
        """
        for rank, line in enumerate(self._lines):
            line.connection.settimeout(timeout_s)
            try:
                line.send(step)
            except TimeoutError:
                raise self._hung(timeout_s) from None
            except OSError:
                raise self._lost(rank) from None

    def receive(self, left_s: float, allowed_s: float) -> tuple[int, Ready | Done]:
        """The next message of any rank, and which one's.

        Args:
            left_s: how long it is waited for.
            allowed_s: how long all of it may take, for whoever reads the error.

        Raises:
            ExecutorLostError: a rank is gone, or none says anything in the time.
        """
        ready = self._selector.select(max(left_s, 0.0))
        if not ready:
            raise self._hung(allowed_s)
        rank: int = ready[0][0].data
        line = self._lines[rank]
        line.connection.settimeout(max(left_s, _SETTLE_S))
        try:
            message = line.receive()
        except TimeoutError:
            raise self._hung(allowed_s) from None
        except (OSError, EOFError):
            raise self._lost(rank) from None
        except DataError as error:
            self._end()
            raise ExecutorLostError(f"{self._name(rank)} is not understood: {error}") from error
        if isinstance(message, Done):
            self._steps_done[rank] = message.number
        return rank, message

    def check(self) -> None:
        """Looks whether all ranks are there.

        Raises:
            ExecutorLostError: one is gone.
        """
        for rank, process in enumerate(self.processes):
            if process.poll() is not None:
                raise self._lost(rank)

    def close(self) -> None:
        """Ends all ranks; returns once they are gone."""
        self._end()

    def _start(self, job: Job, start: Start) -> None:
        folder = Path(self._folder.name)
        for rank in range(self._mesh.num_ranks):
            mine, its = socket.socketpair()
            with its:
                line = Line(mine, heard=FROM_RANKS, told=TO_RANKS)
                self._lines.append(line)
                self._selector.register(mine, selectors.EVENT_READ, rank)
                self.processes.append(start(its, folder / f"rank-{rank}.log", job))
            line.send(Begin(job=job, rank=rank, store=str(folder / "store")))
        deadline_s = time.monotonic() + START_S
        for _ in range(self._mesh.num_ranks):
            rank, message = self.receive(deadline_s - time.monotonic(), START_S)
            assert isinstance(message, Ready), f"{self._name(rank)} computes before it is told to"

    def _lost(self, noticed: int) -> ExecutorLostError:
        """A rank is gone: which one was the first, and why. All are ended."""
        until_s = time.monotonic() + _SETTLE_S
        while time.monotonic() < until_s and not self._cause():
            time.sleep(_POLL_S)
        rank = next(iter(self._cause()), noticed)
        code = self.processes[rank].poll()
        words = self._last_words(rank)
        self._end()
        return ExecutorLostError(f"{self._name(rank)} {_how(code)}", last_words=words)

    def _cause(self) -> list[int]:
        """Ranks that have ended, and not because another has."""
        codes = [process.poll() for process in self.processes]
        return [rank for rank, code in enumerate(codes) if code not in _SECOND]

    def _hung(self, timeout_s: float) -> ExecutorLostError:
        """No rank says anything: which one it may be. All are ended."""
        states = [_is_stopped(process.pid) for process in self.processes]
        least = min(self._steps_done)
        behind = [rank for rank, done in enumerate(self._steps_done) if done == least]
        stopped = [rank for rank, is_stopped in enumerate(states) if is_stopped]
        ranks = stopped or behind
        what = "stopped" if stopped else "stuck, or waiting for another that is"
        names = ", ".join(map(self._name, ranks))
        words = "\n".join(self._last_words(rank) for rank in ranks)
        self._end()
        text = f"no answer in {timeout_s:.1f} s: {names} {what}"
        return ExecutorLostError(text, last_words=words)

    def _name(self, rank: int) -> str:
        return self._mesh.name_rank(rank)

    def _last_words(self, rank: int) -> str:
        path = Path(self._folder.name) / f"rank-{rank}.log"
        if not path.exists():
            return ""
        return "\n".join(path.read_text(errors="replace").splitlines()[-_NUM_LINES:])


def _end(
    processes: Sequence[Process],
    lines: Sequence[Line],
    selector: selectors.BaseSelector,
    folder: tempfile.TemporaryDirectory[str],
) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    for process in processes:
        process.wait()
    selector.close()
    for line in lines:
        line.close()
    folder.cleanup()


def _how(code: int | None) -> str:
    if code is None:
        return "has closed its connection"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"has ended with exit code {code}"


def _is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process; unknown is no."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in ("T", "t")
