from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts Python on a program; ends it when the test is over."""
    started: list[subprocess.Popen[str]] = []

    def start(program: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, *arguments]
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too
        process.communicate()


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Whether a process is there that has not ended; nobody may have waited for it."""

    def check(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        status = Path(f"/proc/{pid}/status")
        return not status.exists() or "\nState:\tZ" not in status.read_text()

    return check


@pytest.fixture
def ends_within(is_running: Callable[[int], bool]) -> Callable[[int, float], bool]:
    def wait(pid: int, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        while is_running(pid) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return not is_running(pid)

    return wait
