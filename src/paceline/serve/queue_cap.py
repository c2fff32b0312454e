"""How much may wait: a queue without an end is a promise that nobody can keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.core.errors import PacelineError
from paceline.serve.request import Request


class QueueFullError(PacelineError):
    """More waits than may; the request was not taken and can be sent again later."""


@dataclass(frozen=True, slots=True)
class QueueCap:
    """What may wait to be computed.

    Attributes:
        max_requests: how many.
        max_tokens: of all their prompts together. One request may always wait, whatever its length.
    """

    max_requests: int
    max_tokens: int

    def has_room(self, waiting: Sequence[Request]) -> bool:
        """Whether one more may wait."""
        if len(waiting) >= self.max_requests:
            return False
        return not waiting or sum(len(one.prompt_ids) for one in waiting) < self.max_tokens

    def require_room(self, waiting: Sequence[Request]) -> None:
        """Raises QueueFullError unless one more may wait."""
        if not self.has_room(waiting):
            raise QueueFullError("too many requests wait", hint="send it again later")
