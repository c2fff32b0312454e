"""From the engine's deltas, which come on its thread, to HTTP bodies on the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from paceline.serve.api.errors import EngineFailedError
from paceline.serve.api.shapes import Envelope, usage
from paceline.serve.engine import Engine
from paceline.serve.request import Delta, FinishReason, Request

_DISCONNECT_POLL_S = 0.5


class AnswerStream:
    """The deltas of one request; leaving it early cancels the request.

    Args:
        engine: answers.
        request: has been handed in once this is made.

    Raises:
        RequestError: the model cannot answer the request.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_done = False
        self._num_tokens = 0
        self._prompt_tokens = len(request.prompt_ids)
        self._id = engine.submit(request, self._put)

    def _put(self, delta: Delta) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)

    async def next(self) -> Delta:
        """The next part of the answer.

        Raises:
            EngineFailedError: the answer will not be finished.
        """
        delta = await self._queue.get()
        self._num_tokens += len(delta.token_ids)
        self._is_done = delta.finish_reason is not None
        if delta.finish_reason in ("abort", "error", "timeout"):
            raise EngineFailedError
        return delta

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        if not self._is_done:
            self._engine.cancel(self._id)

    @property
    def is_done(self) -> bool:
        return self._is_done

    @property
    def usage(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._num_tokens)


async def whole_answer(
    stream: AnswerStream, envelope: Envelope, is_gone: Callable[[], Awaitable[bool]]
) -> dict[str, Any] | None:
    """The body of a whole answer, or None if the client has left before it was done."""
    answer = asyncio.ensure_future(_joined(stream))
    leaving = asyncio.ensure_future(_until_gone(is_gone))
    try:
        await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            return None
        text, finish_reason = answer.result()
        return envelope.body(text, finish_reason, stream.usage)
    finally:
        answer.cancel()
        leaving.cancel()
        stream.close()


async def _joined(stream: AnswerStream) -> tuple[str, FinishReason]:
    """The whole text of an answer, and what ended it."""
    text = ""
    while True:
        delta = await stream.next()
        text += delta.text
        if delta.finish_reason is not None:
            return text, delta.finish_reason


async def _until_gone(is_gone: Callable[[], Awaitable[bool]]) -> None:
    while not await is_gone():
        await asyncio.sleep(_DISCONNECT_POLL_S)


async def event_stream(
    stream: AnswerStream, envelope: Envelope, *, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: chunks as they come, usage if wanted, ``[DONE]``."""
    try:
        if (first := envelope.shape.first()) is not None:
            yield _event(envelope.chunk(first, None))
        while not stream.is_done:
            delta = await stream.next()
            if delta.text or delta.finish_reason:
                yield _event(envelope.chunk(envelope.shape.part(delta.text), delta.finish_reason))
        if with_usage:
            yield _event(envelope.usage_chunk(stream.usage))
        yield "data: [DONE]\n\n"
    except EngineFailedError:
        yield _event({"error": {"message": "the engine stopped", "type": "server_error"}})
    finally:
        stream.close()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
