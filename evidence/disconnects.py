"""Proof: whenever clients leave, nothing of theirs stays, and nobody else notices.

Requests come many at a time, streamed and whole, and most of their clients leave at a seeded random
moment: in the middle of the request, at once after it, after some bytes of the answer; with a
farewell or with a reset. After each batch every block must be free or cached, `/health` must say
so, and a request that stays must get the answer that it got before the first batch.
Each batch leaves a record; started again, the proof goes on where it was.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from served import Served, request, served, text_of

from paceline.core import rng
from paceline.core.errors import PacelineError
from paceline.core.record import Record, RecordWriter, read_records

BATCH = 250
_AT_A_TIME = 32
_MAX_TOKENS = 120
_MAX_BYTES = 30_000  # of an answer, about
_CONTROL = request("the one who stays", 24)
_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRecord(Record):
    """One batch.

    Attributes:
        number: of the batch, from 1.
        requests: of it.
        left: how many clients left before their answer was done.
        preempted: requests that lost their blocks meanwhile, for want of others.
    """

    kind: ClassVar[str] = "batch"
    number: int
    requests: int
    left: int
    preempted: int


def prove(folder: Path, requests: int, seed: int = 0) -> list[dict[str, object]]:
    """Sends batches until there are `requests`.

    Args:
        folder: of the proof.
        requests: how many; a multiple of `BATCH`.
        seed: of the moments.

    Raises:
        PacelineError: a block is leaked, or an answer is not what it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "batches.jsonl"
    done = len(list(read_records(path))) if path.exists() else 0
    if done * BATCH < requests:
        writer = RecordWriter(path)
        with served() as server:
            expected = asyncio.run(text_of(server.port, _CONTROL))
            for number in range(done + 1, requests // BATCH + 1):
                writer.write(_batch(server, number, seed, expected))
        writer.close()
    return list(read_records(path))


def _batch(server: Served, number: int, seed: int, expected: str) -> BatchRecord:
    before = server.engine.book.num_preempted
    left = asyncio.run(_send(server.port, number, seed))
    server.require_balanced()
    if not server.engine.is_healthy:
        raise PacelineError(f"batch {number}: the engine has stopped")
    if (found := asyncio.run(text_of(server.port, _CONTROL))) != expected:
        raise PacelineError(f"batch {number}: {found!r} instead of {expected!r}")
    preempted = server.engine.book.num_preempted - before
    return BatchRecord(number=number, requests=BATCH, left=left, preempted=preempted)


async def _send(port: int, number: int, seed: int) -> int:
    """A batch of requests; how many of their clients left early."""
    room = asyncio.Semaphore(_AT_A_TIME)

    async def one(position: int) -> bool:
        draws = rng.uniform(6, seed=seed, purpose="disconnects", position=position)
        async with room:
            return await _visit(port, [float(draw) for draw in draws])

    first = number * BATCH
    return sum(await asyncio.gather(*(one(first + index) for index in range(BATCH))))


async def _visit(port: int, draws: list[float]) -> bool:
    """One client; whether it left before its answer was done."""
    how, when, length, tokens, is_streamed, is_reset = draws
    prompt = "a cyclist " * (1 + int(12 * length))
    sent = request(prompt, 1 + int(_MAX_TOKENS * tokens), stream=is_streamed < 0.7)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if is_reset < 0.5:
        peer = writer.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    try:
        if how < 0.2:
            writer.write(sent[: int(len(sent) * when)])
            return True
        writer.write(sent)
        if how < 0.4:
            await asyncio.sleep(0.05 * when)
            return True
        to_read = _MAX_BYTES * when if how < 0.85 else float("inf")
        while to_read > 0:
            part = await reader.read(4096)
            if not part:
                return False
            to_read -= len(part)
        return True
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


def summary(records: list[dict[str, object]]) -> str:
    """What it came to, in words."""
    left = sum(int(str(record["left"])) for record in records)
    preempted = sum(int(str(record["preempted"])) for record in records)
    return f"{left:,} clients left early, {preempted:,} requests were preempted"
