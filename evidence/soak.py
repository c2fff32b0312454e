"""Proof: at saturation for a long time, memory stays flat and latency stationary.

As many clients as keep the queue from ever being empty ask without a pause. Each interval leaves a
record; at the end the intervals of the second half are compared with those of the first, every
block must be free or cached, and what the metrics count must be what the clients have seen.
A soak that was broken off begins anew: half of one proves nothing.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from served import Served, request, served, text_of

from paceline.core import rng
from paceline.core.errors import PacelineError
from paceline.core.record import Record, RecordWriter, read_records
from paceline.plan.plan import LimitsConfig
from paceline.serve.tally import Tally

CLIENTS = 48
WARM_SHARE = 0.2
"""Of the intervals, not compared: pools and caches fill."""
MOST_GROWTH_BYTES = 24 << 20
MOST_DRIFT = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class IntervalRecord(Record):
    """One interval.

    Attributes:
        number: from 1.
        requests: answered in it.
        latency_s: median of these.
        resident_bytes: of the process, clients included, at its end.
        waiting: requests that waited then.
    """

    kind: ClassVar[str] = "interval"
    number: int
    requests: int
    latency_s: float
    resident_bytes: int
    waiting: int


@dataclass
class _Seen:
    """What the clients have seen."""

    latencies_s: list[float] = field(default_factory=list)
    requests: int = 0
    is_over: bool = False


def prove(folder: Path, duration_s: float, intervals: int = 20) -> list[dict[str, object]]:
    """Soaks unless it has been done.

    Args:
        folder: of the proof.
        duration_s: of the soak.
        intervals: that it is divided into.

    Raises:
        PacelineError: memory grows, latency drifts, or numbers do not add up.
    """
    path = folder / "intervals.jsonl"
    records = list(read_records(path)) if path.exists() else []
    if len(records) < intervals:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with served(LimitsConfig()) as server:
            tally = Tally(server.engine.spec, server.engine.dtype)
            server.engine.observe(tally)
            seen = asyncio.run(_soak(server, path, duration_s, intervals))
            server.require_balanced()
        _require_counted(tally, seen)
        records = list(read_records(path))
    _require_steady(records)
    return records


async def _soak(server: Served, path: Path, duration_s: float, intervals: int) -> _Seen:
    seen, writer = _Seen(), RecordWriter(path)
    clients = [
        asyncio.ensure_future(_ask_on(server.port, number, seen)) for number in range(CLIENTS)
    ]
    for number in range(1, intervals + 1):
        await asyncio.sleep(duration_s / intervals)
        latencies_s, seen.latencies_s = seen.latencies_s, []
        if not latencies_s:
            raise PacelineError(f"interval {number}: no answer")
        record = IntervalRecord(
            number=number,
            requests=len(latencies_s),
            latency_s=statistics.median(latencies_s),
            resident_bytes=_resident_bytes(),
            waiting=len(server.engine.waiting()),
        )
        writer.write(record)
    seen.is_over = True
    await asyncio.gather(*clients)
    writer.close()
    return seen


async def _ask_on(port: int, client: int, seen: _Seen) -> None:
    """One client, who asks again as soon as it is answered."""
    position = 0
    while not seen.is_over:
        draws = rng.uniform(2, seed=client, purpose="soak", position=position)
        prompt = f"{client} {position} " + "a long road " * int(1 + 10 * draws[0])
        start_s = time.perf_counter()
        await text_of(port, request(prompt, 4 + int(40 * draws[1])))
        seen.latencies_s.append(time.perf_counter() - start_s)
        seen.requests += 1
        position += 1


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def _require_counted(tally: Tally, seen: _Seen) -> None:
    """Every request ended once, and the metrics know of each."""
    if (ended := sum(tally.finished.values())) != seen.requests:
        raise PacelineError(f"{ended} requests are counted, {seen.requests} were answered")
    if tally.finished.keys() - {"length", "stop"}:
        raise PacelineError(f"requests ended otherwise: {dict(tally.finished)}")


def _require_steady(records: list[dict[str, object]]) -> None:
    warm = records[int(len(records) * WARM_SHARE) :]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    growth = _median(second, "resident_bytes") - _median(first, "resident_bytes")
    if growth > MOST_GROWTH_BYTES:
        raise PacelineError(f"memory grew by {growth / 2**20:.1f} MiB")
    drift = _median(second, "latency_s") / _median(first, "latency_s")
    if not 1 / MOST_DRIFT < drift < MOST_DRIFT:
        raise PacelineError(f"latency became {drift:.2f} times what it was")
    if any(int(str(record["waiting"])) == 0 for record in records):
        raise PacelineError("the queue was empty: this was no saturation")


def _median(records: list[dict[str, object]], key: str) -> float:
    return statistics.median(float(str(record[key])) for record in records)


def summary(records: list[dict[str, object]]) -> str:
    """What it came to, in words."""
    warm = records[int(len(records) * WARM_SHARE) :]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    growth = _median(second, "resident_bytes") - _median(first, "resident_bytes")
    total = sum(int(str(record["requests"])) for record in records)
    before_s, after_s = _median(first, "latency_s"), _median(second, "latency_s")
    return (
        f"{total:,} answers; memory {growth / 2**20:+.1f} MiB from the first half to the second, "
        f"median latency {before_s:.2f} s, then {after_s:.2f} s"
    )
