"""From the engine's deltas, which come on its thread, to HTTP bodies on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.types import Receive

from paceline.serve.api.asked import Asked
from paceline.serve.api.choices import Choice, Piece, join
from paceline.serve.api.errors import EngineFailedError, failure_body
from paceline.serve.api.schema import StreamOptions
from paceline.serve.api.shapes import Envelope, event, usage
from paceline.serve.engine import Engine
from paceline.serve.request import Delta


class Handover:
    """Carries deltas from the engine's threads to an event loop, all that wait in one call.

    A step of the engine gives a delta to each request; to wake the loop for each of them would
    cost more than to make its event.

    Args:
        loop: whose thread calls `Answers`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._lock = threading.Lock()
        self._waiting: list[tuple[Answers, Choice, Delta]] = []

    def put(self, answers: Answers, choice: Choice, delta: Delta) -> None:
        """Hands a delta over, from any thread."""
        with self._lock:
            self._waiting.append((answers, choice, delta))
            is_called = len(self._waiting) > 1
        if not is_called and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for answers, choice, delta in waiting:
            answers.receive(choice, delta)


class Answers:
    """All choices of the answer to one HTTP request; leaving it early cancels them all.

    Args:
        engine: answers.
        handover: to the running event loop.
        asked: has been handed in once this is made.

    Raises:
        RequestError: the model cannot answer it.
    """

    def __init__(self, engine: Engine, handover: Handover, asked: Asked) -> None:
        self._engine = engine
        self._num_choices = asked.num_choices  # of each prompt
        self._news = asyncio.Event()
        self._fresh: dict[Choice, None] = {}
        self._ids: dict[Choice, int] = {}  # of those that have not ended
        self.choices = [
            Choice(index, request, echo, is_silent=asked.is_silent, use=asked.tools)
            for index, (request, echo) in enumerate(asked.each())
        ]
        try:
            for choice in self.choices:
                on_delta = partial(handover.put, self, choice)
                self._ids[choice] = engine.submit(choice.request, on_delta)
        except Exception:
            self.close()
            raise

    def receive(self, choice: Choice, delta: Delta) -> None:
        """A part of a choice has come."""
        choice.receive(delta)
        if choice.is_waiting:
            self._fresh[choice] = None
            self._news.set()

    async def news(self) -> list[tuple[Choice, Piece]]:
        """What is new of which choices, once something is.

        Raises:
            EngineFailedError: a choice will not be finished.
        """
        await self._news.wait()
        fresh, self._fresh = self._fresh, {}
        pieces = [(choice, choice.take()) for choice in fresh]
        self._fresh = {choice: None for choice in fresh if choice.is_waiting}
        if not self._fresh:
            self._news.clear()
        for choice in fresh:
            if choice.is_done:
                self._leave(choice)
        return pieces

    def close(self) -> None:
        """Cancels what has not ended."""
        for choice in list(self._ids):
            self._leave(choice)

    @property
    def is_done(self) -> bool:
        return not self._ids

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens read, found in the cache, and written so far; a prompt of many choices is one."""
        prompts = self.choices[:: self._num_choices]
        return usage(
            sum(len(choice.request.prompt_ids) for choice in prompts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.num_found for choice in prompts),
        )

    def _leave(self, choice: Choice) -> None:
        """Ends a choice; the engine may not know yet, as of one whose client has left."""
        number = self._ids.pop(choice)
        if not choice.has_ended:
            self._engine.cancel(number)


async def whole_answer(
    answers: Answers, envelope: Envelope, receive: Receive
) -> dict[str, Any] | None:
    """The body of a whole answer, or None if the client has left before it was done.

    Raises:
        EngineFailedError: it will not be done.
    """
    joined = asyncio.ensure_future(_joined(answers))
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([joined, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not joined.done():
            return None
        return envelope.body(joined.result(), answers.usage)
    finally:
        joined.cancel()
        leaving.cancel()
        answers.close()


async def _joined(answers: Answers) -> list[tuple[Choice, Piece]]:
    """All of every choice."""
    pieces: dict[Choice, list[Piece]] = {choice: [] for choice in answers.choices}
    while not answers.is_done:
        for choice, piece in await answers.news():
            pieces[choice].append(piece)
    return [(choice, join(parts)) for choice, parts in pieces.items()]


async def _left(receive: Receive) -> None:
    """Returns once the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def event_stream(
    answers: Answers, envelope: Envelope, options: StreamOptions
) -> AsyncIterator[str]:
    """Server-sent events: what is new as it comes, usage if wanted, ``[DONE]``."""
    try:
        while not answers.is_done:
            news = await answers.news()
            totals = answers.usage if options.continuous_usage_stats else None
            told = [(choice, piece) for choice, piece in news if piece.says_something]
            if told:
                yield "".join(envelope.event(choice, piece, totals) for choice, piece in told)
        if options.include_usage:
            yield event(envelope.usage_chunk(answers.usage))
        yield "data: [DONE]\n\n"
    except EngineFailedError as error:
        yield event(failure_body(error))
    finally:
        answers.close()
