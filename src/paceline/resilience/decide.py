"""What becomes of a run whose ranks have failed: a decision over what has happened so far."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.core.errors import RankError
from paceline.plan.plan import ResilienceConfig

_FIGURE = re.compile(r"\d+(\.\d+)?")
MAX_SAME = 3
"""A failure that has come so often in the same way, one time after the other, would come again."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How ranks have ended that should have gone on.

    Attributes:
        step: the last one that any of them has finished.
        ranks: whose fault it was, where that is known.
        why: in words, without a traceback.
        comes_again: whether another start would come to the same.
    """

    step: int
    ranks: tuple[int, ...]
    why: str
    comes_again: bool = False

    @classmethod
    def of(cls, error: RankError, step: int) -> Ending:
        """What an error of the ranks comes to."""
        return cls(step, error.ranks, error.message.partition("\n")[0], error.comes_again)

    def is_same(self, other: Ending) -> bool:
        """Whether another one was at the same step and of the same kind, in whatever figures."""
        told = [_FIGURE.sub("", ending.why) for ending in (self, other)]
        return (self.step, self.ranks) == (other.step, other.ranks) and told[0] == told[1]


@dataclass(frozen=True, slots=True)
class Stop:
    """The run ends.

    Attributes:
        reason: why no other start would help; empty where none was asked for.
    """

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Restart:
    """The run is started again.

    Attributes:
        num_lost: how many ranks it has to do without.
    """

    num_lost: int = 0


def decide(endings: Sequence[Ending], config: ResilienceConfig) -> Stop | Restart:
    """What to do after the last of them.

    Args:
        endings: of every start so far, at least one.
        config: what the plan says.
    """
    last, num_restarts = endings[-1], len(endings) - 1
    if config.on_failure == "stop":
        return Stop()
    if last.comes_again:
        return Stop("another start would come to the same")
    if len(endings) >= MAX_SAME and all(ending.is_same(last) for ending in endings[-MAX_SAME:]):
        return Stop(f"it has come to this {MAX_SAME} times one after the other")
    if num_restarts >= config.max_restarts:
        return Stop(f"it has been restarted {num_restarts} time(s) (resilience.max_restarts)")
    return Restart(len(last.ranks) if config.on_failure == "shrink" else 0)
