"""What fails on one rank fails on all, so that none waits for another for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from paceline.core.errors import PacelineError
from paceline.dist.world import World

T = TypeVar("T")


def agreed(world: World, work: Callable[[], T]) -> list[T]:
    """Does work that every rank takes part in, and returns once all have succeeded.

    Returns:
        What the work has given, plain data, in order of rank.

    Raises:
        Exception: this rank's own, if it has failed.
        PacelineError: another rank has failed; it is named.
    """
    try:
        given: T | _Failed = work()
    except Exception as error:
        world.collect(_Failed(str(error)))
        raise
    results: list[T] = []
    for rank, result in enumerate(world.collect(given)):
        if isinstance(result, _Failed):
            raise PacelineError(f"{world.mesh.name_rank(rank)}: {result.why}")
        results.append(result)
    return results


class _Failed(NamedTuple):
    why: str
