"""Time as an argument: a real clock for runs, a virtual one for simulation and tests."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """What runners are given instead of the `time` module."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Returns once `duration_s` have passed on this clock."""
        ...


class WallClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        return time.perf_counter()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


class VirtualClock:
    """A clock that moves only when it is told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def sleep(self, duration_s: float) -> None:
        if duration_s < 0:
            raise ValueError(f"a clock cannot go back: duration_s = {duration_s}")
        self._now_s += duration_s
