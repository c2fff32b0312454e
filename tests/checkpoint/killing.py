"""Processes that kill themselves at the n-th thing that they do to the disk."""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")
"""Beside opening a file to write, and writing."""


class Counter:
    """Counts what this process does to the disk from now on, and kills it at some point.

    Args:
        number: the process dies before its n-th operation, in the middle of it where it is a
            write; 0 for never.
    """

    def __init__(self, number: int) -> None:
        self.count = 0
        self._number = number
        self._lock = threading.Lock()
        for name in CALLS:
            setattr(os, name, self._counted(getattr(os, name)))
        self._open = io.open
        io.open = builtins.open = self._open_counted  # type: ignore[assignment]

    def is_over(self) -> bool:
        """Counts one more, and says whether it is the last."""
        with self._lock:
            self.count += 1
            return self.count == self._number

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.is_over():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        return call

    def _open_counted(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode not in ("w", "wb") or not isinstance(file, str | Path):
            return self._open(file, mode, *arguments, **options)
        if self.is_over():
            os.kill(os.getpid(), signal.SIGKILL)
        stream = _Stream(io.FileIO(file, "w"), self)
        return stream if mode == "wb" else io.TextIOWrapper(stream, encoding="utf-8")


class _Stream(io.BufferedWriter):
    """A file whose writes are counted; the one that is the last is written half."""

    def __init__(self, raw: io.FileIO, counter: Counter) -> None:
        super().__init__(raw)
        self._counter = counter

    def write(self, data: Any) -> int:
        if self._counter.is_over():
            super().write(memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)
