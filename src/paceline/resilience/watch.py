"""The watcher of a run: reads what its ranks leave, again and again, and tells of what is wrong."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from paceline.core.errors import DataError
from paceline.core.files import write_text
from paceline.dist.calls import Process, RankTrace
from paceline.dist.ring import RingReader, ring_folder, ring_path
from paceline.plan.mesh import MeshConfig
from paceline.resilience.verdict import Verdict, judge, timeouts_of

POLL_S = 0.25
# What judging may take of a core: it must not slow down what it watches.
_SHARE = 0.01
_WINDOW_S = 2.0
_WINDOW_STEPS = 12
# A watcher that has not looked for so long has been suspended, as its ranks have: it looks again.
_GAP_S = 2.0


class Rings:
    """The rings of a run, as its ranks make them, one after the other.

    Args:
        run: the run's folder.
        since_s: rings of ranks that had started before are of an earlier start, and left out.
    """

    def __init__(self, run: Path, *, since_s: float = 0.0) -> None:
        self._run, self._since_s = run, since_s
        self._readers: dict[int, RingReader] = {}

    def read(self, ranks: Sequence[int], *, is_whole: bool) -> list[RankTrace]:
        """What the ranks have left that there are.

        Args:
            ranks: whose rings are wanted.
            is_whole: whether finished calls are wanted too.
        """
        traces = [self._read(rank, is_whole=is_whole) for rank in ranks]
        return [t for t in traces if t is not None and t.started_s >= self._since_s]

    def _read(self, rank: int, *, is_whole: bool) -> RankTrace | None:
        reader = self._readers.get(rank)
        if reader is None or not reader.is_current():
            try:
                reader = self._readers[rank] = RingReader(ring_path(self._run, rank))
            except (OSError, DataError):  # not yet, or not yet whole
                self._readers.pop(rank, None)
                return None
        # The process before its ring: one that ends in between has said so, and is not missed.
        process = _process(reader.pid, reader.host)
        return replace(reader.read(is_whole=is_whole), process=process)


def verdict_path(run: Path) -> Path:
    """Where the last verdict is written."""
    return ring_folder(run) / "verdict.json"


def mesh_of(run: Path) -> MeshConfig | None:
    """The mesh of the ranks that have left rings last; None where none has."""
    paths = list(ring_folder(run).glob("rank-*.ring"))
    return RingReader(max(paths, key=lambda path: path.stat().st_mtime)).mesh if paths else None


def recent(traces: Sequence[RankTrace], since_s: float) -> list[RankTrace]:
    """Traces with those calls alone that are open, or have ended since."""
    return [
        replace(trace, calls=tuple(c for c in trace.calls if (c.leave_s or since_s) >= since_s))
        for trace in traces
    ]


def pids(run: Path) -> dict[int, int]:
    """The process of each rank of a run that has left a ring, whether it is there still or not."""
    readers = [RingReader(path) for path in sorted(ring_folder(run).glob("rank-*.ring"))]
    traces = [reader.read(is_whole=False) for reader in readers]
    return {trace.rank: trace.pid for trace in traces}


def _process(pid: int, host: str) -> Process:
    """What this machine's kernel says of a rank's process."""
    if host != socket.gethostname():
        return "unknown"
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "unknown" if not Path("/proc/self").exists() else "gone"
    state = text.rpartition(")")[2].split()[0]  # a name in brackets comes before it
    if state in "ZX":
        return "gone"
    return "stopped" if state in "Tt" else "running"


class Watcher:
    """Watches a run from a thread of the process that has launched it.

    Args:
        folder: the run's folder.
        mesh: of the run.
        patience: a rank that others wait for is taken to hang after the median step time plus
            this many deviations.
        on_verdict: told of each verdict once, in the watcher's thread.

    Attributes:
        verdict: the last one.
    """

    def __init__(
        self,
        folder: Path,
        mesh: MeshConfig,
        patience: float,
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        self.verdict: Verdict | None = None
        self._folder, self._mesh, self._patience = folder, mesh, patience
        self._on_verdict = on_verdict
        self._rings = Rings(folder, since_s=time.time())
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._windows_s = 0.0, 0.0  # when the last but one began, and the last
        self._window_end_s = 0.0
        self._told: Verdict | None = None

    def start(self) -> None:
        """Begins to watch: before the ranks are started, whose earlier rings do not count."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it: then nobody is told any more. May be called by what is told."""
        self._is_over.set()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self) -> Verdict | None:
        """Looks once, and gives the verdict, if there is one.

        At the end of a window of steps finished calls are judged too: those of that window and of
        the one before, because a long wait begins in one and ends in the next.
        """
        now_s = time.time()
        is_whole = now_s >= self._window_end_s
        traces = self._rings.read(range(self._mesh.num_ranks), is_whole=is_whole)
        if not is_whole:
            return judge(traces, now_s, patience=self._patience)
        before_s, begin_s = self._windows_s
        found = judge(recent(traces, before_s), now_s, patience=self._patience)
        if found is None:
            self._told = None  # what comes back after a clean window is told again
        step_s = timeouts_of(traces, self._patience).step_s or 0.0
        least_s = max(_WINDOW_S, _WINDOW_STEPS * step_s, (time.time() - now_s) / _SHARE)
        self._windows_s, self._window_end_s = (begin_s, now_s), now_s + least_s
        return found

    def _watch(self) -> None:
        looked_s = time.monotonic()
        while not self._is_over.wait(POLL_S):
            gap_s, looked_s = time.monotonic() - looked_s, time.monotonic()
            if gap_s > _GAP_S:
                continue
            found = self.look()
            is_new = found is not None and not (self._told and self._told.is_same(found))
            if found is not None and is_new and not self._is_over.is_set():
                self._told = self.verdict = found
                self._write(found)
                self._on_verdict(found)

    def _write(self, verdict: Verdict) -> None:
        entry = {"time_s": time.time(), "watcher": os.getpid(), **asdict(verdict)}
        write_text(verdict_path(self._folder), json.dumps(entry) + "\n")
