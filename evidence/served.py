"""A server in this process, whose blocks a proof can count, and requests as they go to it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from paceline.core.errors import PacelineError
from paceline.plan.plan import LimitsConfig, Plan
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.server import EngineThread, listen, server_around
from paceline.serve.engine import Engine
from paceline.serve.load import load_engine

MODEL = "random:llama:tiny"
_SETTINGS = ('serve.dtype="float32"', "serve.max_sequences=16", "serve.kv_memory_bytes=2000000")
_IDLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Served:
    """A running server."""

    engine: Engine
    port: int

    def require_balanced(self) -> None:
        """Raises PacelineError unless every block is free or cached, now that nothing is asked."""
        end_s = time.monotonic() + _IDLE_S
        while self.engine.book or self.engine.waiting():
            if time.monotonic() > end_s:
                raise PacelineError(f"{len(self.engine.book)} requests never end")
            time.sleep(0.01)
        pool = self.engine.book.kv.pool
        pool.check()
        if pool.num_held or pool.num_free != pool.num_blocks:
            raise PacelineError(f"{pool.num_held} of {pool.num_blocks} blocks are leaked")


@contextmanager
def served(limits: LimitsConfig | None = None) -> Iterator[Served]:
    """A tiny model behind HTTP on a free port of this machine."""
    plan = Plan().with_overrides(list(_SETTINGS))
    opener = ApiKeys([])
    thread = EngineThread(lambda: load_engine(MODEL, plan, device="cpu"))
    with listen("127.0.0.1", 0, opener) as listener:
        server = server_around(thread.engine, MODEL, opener, limits or LimitsConfig())
        loop = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        loop.start()
        try:
            yield Served(thread.engine, listener.getsockname()[1])
        finally:
            server.should_exit = True
            loop.join()
            thread.stop()


def request(prompt: str, max_tokens: int, **more: Any) -> bytes:
    """A completion as it goes over the wire."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0} | more
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content


async def text_of(port: int, sent: bytes) -> str:
    """The answer to a whole request.

    Raises:
        PacelineError: it is not 200.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        received = await reader.read()
    finally:
        writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise PacelineError(f"refused: {received[:500]!r}")
    return json.loads(body)["choices"][0]["text"]
