"""Where answers leave the engine: tokens become text and go to whoever asked.

Beside a running engine this is the work of a thread of its own, so that no step waits for text.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from paceline.decode.sampler import Sampled
from paceline.serve.observe import Observer
from paceline.serve.request import Delta, FinishReason, RequestState

_log = logging.getLogger(__name__)


class Event(NamedTuple):
    """Something that has happened to a request.

    Attributes:
        state: of the request.
        sampled: its next token, if there is one.
        reason: that it has ended for, as far as the engine knows.
        error: why, where the reason is an error.
        prompt: its prompt's tokens but the first with their log-probabilities, once, where they
            are asked for.
    """

    state: RequestState
    sampled: Sampled | None
    reason: FinishReason | None
    error: str = ""
    prompt: tuple[Sampled, ...] = ()


class Outlet:
    """Hands answers over.

    Args:
        on_stopped: called with the id of a request that needs no more tokens, from whatever thread
            `put` or the outlet's own is.

    Attributes:
        observer: told of every part of an answer, once it is handed over.
    """

    def __init__(self, on_stopped: Callable[[int], None]) -> None:
        self.observer: Observer | None = None
        self._on_stopped = on_stopped
        self._ended: set[int] = set()  # before the engine knows
        self._events: queue.SimpleQueue[Sequence[Event] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on a thread hands over what is put."""
        self._thread = threading.Thread(target=self._work, name="outlet", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Returns once all that has been put is handed over."""
        if self._thread is not None:
            self._events.put(None)
            self._thread.join()
            self._thread = None

    def put(self, events: Sequence[Event]) -> None:
        """Hands over, in order, at once or soon."""
        if self._thread is None:
            self._hand_over(events)
        else:
            self._events.put(events)

    def _work(self) -> None:
        while (events := self._events.get()) is not None:
            self._hand_over(events)

    def _hand_over(self, events: Sequence[Event]) -> None:
        for event in events:
            number = event.state.id
            if number not in self._ended:
                delta = _delta(event)
                is_heard = self._give(event.state, delta)
                if self.observer is not None:
                    self.observer.told(event.state, delta)
                if event.reason is None and (delta.finish_reason is not None or not is_heard):
                    if delta.finish_reason is not None:
                        self._ended.add(number)
                    self._on_stopped(number)
            if event.reason is not None:
                self._ended.discard(number)

    def _give(self, state: RequestState, delta: Delta) -> bool:
        """Gives a part to whoever asked; a receiver that fails harms nobody else's request."""
        try:
            state.text.on_delta(delta)
        except Exception:
            _log.exception("the receiver of request %d failed; it is cancelled", state.id)
            return False
        return True


def _delta(event: Event) -> Delta:
    if event.sampled is None:
        return Delta("", (), event.reason, event.error)
    state = event.state
    found = state.num_found or 0
    return state.text.push(event.sampled, event.reason, prompt=event.prompt, num_found=found)
