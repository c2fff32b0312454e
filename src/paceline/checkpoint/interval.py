"""How many steps lie between two saves.

Source: Mohan et al., CheckFreq: Frequent, Fine-Grained DNN Checkpointing, FAST 2021, Sec. 4.2.
Differs: what saves slow down beside them is measured on the run's own steps, and no phase of
    profiling comes first.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.checkpoint.base import SaveRecord, Told
from paceline.dist.world import World
from paceline.plan.plan import CheckpointConfig

_FIRST_STEPS = 10  # between the first saves, of whose cost nothing is known
_REMEMBERED_STEPS, _REMEMBERED_SAVES = 20, 3


class Costs(NamedTuple):
    """What a save costs, measured.

    Attributes:
        stood_s: that training stands still for a save.
        slowed_s: that steps beside a write take longer, over all of a write.
        write_s: from the begin of a save to its end.
        step_s: of a step beside which nothing is written.
    """

    stood_s: float
    slowed_s: float
    write_s: float
    step_s: float


def steps_between(costs: Costs, share: float) -> int:
    """The fewest steps between two saves of which both hold: the run loses no more than `share` of
    its time to them, and a save is complete before the next is due.
    """
    lost_s = costs.stood_s + costs.slowed_s
    return max(
        1,
        math.ceil(lost_s / (share * costs.step_s)),
        math.ceil(costs.write_s / costs.step_s),
    )


@dataclass(slots=True)
class Measured:
    """What a run has measured of its steps and saves; the newest count.

    Attributes:
        quiet_s: times of steps beside which nothing was written.
        busy_s: times of steps beside which something was.
        saves: seconds that training stood still, and that the write took.
    """

    quiet_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    busy_s: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_STEPS))
    saves: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=_REMEMBERED_SAVES)
    )

    def costs(self) -> Costs | None:
        """What a save costs; None before one has been measured."""
        steps = self.quiet_s or self.busy_s
        if not self.saves or not steps:
            return None
        step_s = statistics.median(steps)
        write_s = statistics.median(write for _, write in self.saves)
        slower_s = max(0.0, statistics.median(self.busy_s) - step_s) if self.busy_s else 0.0
        return Costs(
            stood_s=statistics.median(stood for stood, _ in self.saves),
            slowed_s=slower_s * write_s / (step_s + slower_s),
            write_s=write_s,
            step_s=step_s,
        )


class Interval:
    """Which steps are saved, the last of the run aside; every rank has one and calls it alike.

    Args:
        config: of the run.
        world: the ranks; what counts is what the first has measured.
        step: that the run begins from.
    """

    def __init__(self, config: CheckpointConfig, world: World, step: int) -> None:
        self._config, self._world = config, world
        self._measured = Measured()
        self._is_writing = False
        self._last, self._steps = step, _FIRST_STEPS

    def is_due(self, step: int) -> bool:
        """Whether a step is saved."""
        interval = self._config.interval_steps
        return step - self._last >= self._steps if interval == "auto" else step % interval == 0

    def begin(self, step: int) -> None:
        """A step is saved: decides when the next is, on all ranks alike."""
        self._last, self._is_writing = step, True
        if self._config.interval_steps != "auto":
            return
        costs = self._world.collect(self._measured.costs())[0]
        if costs is not None:
            self._steps = steps_between(costs, self._config.overhead_share)

    def note_step(self, time_s: float) -> None:
        """Takes in what a step has taken."""
        times_s = self._measured.busy_s if self._is_writing else self._measured.quiet_s
        times_s.append(time_s)

    def note_saves(self, saves: Sequence[Told]) -> None:
        """Takes in what has become of saves."""
        for told in saves:
            if told.level != self._config.levels[0]:
                continue
            if told.step == self._last:  # else another is being written since
                self._is_writing = False
            if isinstance(told, SaveRecord):
                self._measured.saves.append((told.time_s, told.write_s))
