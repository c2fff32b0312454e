"""Who may come in now: so many of each key, and none while the queue is full or the door shut."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from paceline.core.clock import Clock, WallClock
from paceline.plan.plan import LimitsConfig
from paceline.serve.engine import Engine
from paceline.serve.queue_cap import QueueCap

_BUSY_S = 1
_FULL_S = 5


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not taken.

    Attributes:
        status: of HTTP.
        reason: in a word, as metrics count it.
        message: what the client is told.
        kind: of error, as OpenAI names them.
        retry_after_s: when it may be sent again; 0 for never.
    """

    status: int
    reason: str
    message: str
    kind: str = "invalid_request_error"
    retry_after_s: int = 0


class Door:
    """Counts the requests that are open; on the event loop only.

    Args:
        engine: that answers them.
        limits: of the plan.
        clock: for the time that open answers have once the door is shut.

    Attributes:
        num_open: requests that have come in and not left.
        refused: how many requests were refused, by reason.
    """

    def __init__(self, engine: Engine, limits: LimitsConfig, clock: Clock | None = None) -> None:
        self.limits, self.num_open = limits, 0
        self.refused: Counter[str] = Counter()
        self._engine, self._clock = engine, clock or WallClock()
        self._of_tenant: Counter[str] = Counter()
        self._shut_s: float | None = None
        self._cap = QueueCap(limits.max_queued_requests, limits.max_queued_tokens)
        engine.queue_cap = self._cap

    def refusal(self, tenant: str) -> Refusal | None:
        """Why a tenant's next request may not come in; None if it may. Without keys, one tenant."""
        if self.is_shut:
            wait_s = math.ceil(self.limits.drain_timeout_s)
            return Refusal(503, "stopping", "the server is stopping", "server_error", wait_s)
        if tenant and self._of_tenant[tenant] >= self.limits.max_requests_per_key:
            most = self.limits.max_requests_per_key
            message = f"this key has {most} requests open, as many as it may"
            return Refusal(429, "key", message, "rate_limit_error", _BUSY_S)
        return None if self.has_room else queue_is_full()

    def enter(self, tenant: str) -> None:
        """A request comes in."""
        self.num_open += 1
        self._of_tenant[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A request that came in has been answered, or its client has left."""
        self.num_open -= 1
        self._of_tenant[tenant] -= 1
        if not self._of_tenant[tenant]:
            del self._of_tenant[tenant]

    def shut(self) -> None:
        """From now on nobody comes in, and those inside have `drain_timeout_s`."""
        self._shut_s = self._clock.now_s()

    @property
    def has_room(self) -> bool:
        """Whether one more may wait."""
        return self._cap.has_room(self._engine.waiting())

    @property
    def is_shut(self) -> bool:
        return self._shut_s is not None

    @property
    def is_drained(self) -> bool:
        """Whether the door is shut, and everybody has left or had time to."""
        if self._shut_s is None:
            return False
        end_s = self._shut_s + self.limits.drain_timeout_s
        return self.num_open == 0 or self._clock.now_s() >= end_s


def queue_is_full() -> Refusal:
    """What is told while too much waits."""
    return Refusal(503, "queue", "too many requests wait", "server_error", _FULL_S)
