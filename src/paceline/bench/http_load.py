"""A client that keeps so many chat requests in flight, and times the tokens that come.

Plain sockets: a client of a library would take a share of the cores that are measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from paceline.core.errors import PacelineError

_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer.

    Attributes:
        first_s: from the request to its first token.
        gaps_s: between one part of the answer and the next.
        num_tokens: of the answer.
        num_prompt_tokens: of the request.
    """

    first_s: float
    gaps_s: tuple[float, ...]
    num_tokens: int
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What some requests came to.

    Attributes:
        answers: in order of the requests.
        time_s: from the first request to the last token.
    """

    answers: tuple[Timed, ...]
    time_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers."""
        return sum(answer.num_tokens for answer in self.answers) / self.time_s


def load(port: int, bodies: Sequence[dict[str, Any]], concurrency: int) -> Load:
    """Sends requests to a server of this machine, so many at a time.

    Args:
        port: of the server.
        bodies: of ``/v1/chat/completions``; each is streamed, with its usage.
        concurrency: requests in flight.

    Raises:
        PacelineError: an answer other than 200, or one that does not come.
    """
    return asyncio.run(asyncio.wait_for(_load(port, bodies, concurrency), _LIMIT_S))


async def _load(port: int, bodies: Sequence[dict[str, Any]], concurrency: int) -> Load:
    waiting = iter(enumerate(bodies))
    answers: dict[int, Timed] = {}

    async def worker() -> None:
        for number, body in waiting:
            answers[number] = await _ask(port, body)

    start_s = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    time_s = time.perf_counter() - start_s
    return Load(tuple(answers[number] for number in sorted(answers)), time_s)


async def _ask(port: int, body: dict[str, Any]) -> Timed:
    """One request on a connection of its own."""
    text = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}})
    start_s = time.perf_counter()
    times_s: list[float] = []
    usage: dict[str, int] | None = None
    async for event in _events(port, text.encode()):
        if event.get("usage"):
            usage = event["usage"]
        if any(_has_text(choice) for choice in event.get("choices", ())):
            times_s.append(time.perf_counter())
    if usage is None or not times_s:
        raise PacelineError(f"the server on port {port} gave no usage, or no text")
    gaps_s = tuple(later - earlier for earlier, later in pairwise(times_s))
    tokens, prompt = usage["completion_tokens"], usage["prompt_tokens"]
    return Timed(times_s[0] - start_s, gaps_s, tokens, prompt)


def _has_text(choice: dict[str, Any]) -> bool:
    return bool(choice.get("delta", {}).get("content"))


async def _events(port: int, body: bytes) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of one answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            rest = await reader.read()
            raise PacelineError(f"the server answers {status.decode().strip()}: {rest[-300:]!r}")
        async for line in reader:  # sizes of chunks are lines too, which are no events
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    finally:
        writer.close()
