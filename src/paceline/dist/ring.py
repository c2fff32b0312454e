"""A rank's collectives in a ring in shared memory: read by anyone at any time, cheap to write.

One file a rank, mapped into memory: RUN/watch/rank-R.ring. A call is a few stores, with no lock and
no system call; a rank that is stopped or dead leaves all it has done. The file has, in this order:

    words     what `_WORDS` names, 8 bytes each
    steps     the last steps: number, begin, end, whether plain
    counters  of each channel: the last sequence that has begun
    names     JSON lines: the mesh, then channels and purposes in the order of their numbers
    slots     the last calls, 64 bytes each; a call's number stands first and last, so that
              one that is being overwritten is told from a whole one

Times in it are nanoseconds of the machine's monotonic clock, which all its processes share. On a
GPU a call returns once it is queued: its times are those of the host, and say who has come how far,
but not how long a transfer takes.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paceline.core.errors import DataError
from paceline.dist.calls import (
    OPERATIONS,
    PHASES,
    STATES,
    Call,
    Channel,
    Phase,
    RankTrace,
    State,
    StepTimes,
)
from paceline.plan.mesh import MeshConfig

HEARTBEAT_S = 0.1
NUM_SLOTS = 8192
_MAGIC, _FORMAT = 0x70616365_6C696E65, 1
_WORDS = {
    name: index
    for index, name in enumerate(
        (
            "magic",
            "format",
            "slots",
            "pid",
            "started",
            "epoch_offset",
            "heartbeat",
            "phase",
            "phase_since",
            "state",
            "step",
            "step_end",
            "num_steps",
            "num_calls",
            "last_call",
            "names_bytes",
        )
    )
}
_WORD = 8
_STEPS, _NUM_STEPS, _STEP_WORDS = 32, 256, 4  # places in words
_COUNTERS, _NUM_COUNTERS = _STEPS + _NUM_STEPS * _STEP_WORDS, 8192
_NAMES, _NAMES_BYTES = (_COUNTERS + _NUM_COUNTERS) * _WORD, 1 << 20
_SLOTS = _NAMES + _NAMES_BYTES
# number, sequence, operation, phase, channel, purpose, bytes, enter, wait, leave, number
_SLOT = struct.Struct("=qqBBHHxxqqqqq")
_SLOT_TYPE = np.dtype(
    {
        "names": [
            *("number", "sequence", "operation", "phase", "channel", "purpose"),
            *("size_bytes", "enter", "wait", "leave", "again"),
        ],
        "formats": ["<i8", "<i8", "u1", "u1", "<u2", "<u2", "<i8", "<i8", "<i8", "<i8", "<i8"],
        "offsets": [0, 8, 16, 17, 18, 20, 24, 32, 40, 48, 56],
        "itemsize": _SLOT.size,
    }
)
_WAIT, _LEAVE = 5, 6  # words within a slot


def ring_folder(run: Path) -> Path:
    """Where the rings of a run lie."""
    return run / "watch"


def ring_path(run: Path, rank: int) -> Path:
    """Where a rank's ring lies."""
    return ring_folder(run) / f"rank-{rank}.ring"


class Ring:
    """A rank's own ring, which it writes; a thread signs it with the time while the process runs.

    Args:
        path: replaced, if there is one of an earlier start.
        mesh: of the run.
        rank: whose ring it is.
    """

    def __init__(self, path: Path, mesh: MeshConfig, rank: int) -> None:
        self._map = _new_map(path)
        # Held in a list of their own, because a view of the map is what costs least to write.
        self._words = memoryview(self._map).cast("q")
        self._channels: dict[tuple[Any, ...], int] = {}
        self._purposes: dict[str, int] = {}
        self._operations = {name: index for index, name in enumerate(OPERATIONS)}
        self._phase: Phase = "starting"
        self._phase_code = PHASES.index(self._phase)
        self._is_plain = True
        self._step_begin = now = time.monotonic_ns()
        self._set(format=_FORMAT, slots=NUM_SLOTS, pid=os.getpid(), started=now, heartbeat=now)
        self._set(epoch_offset=time.time_ns() - now, phase_since=now)
        self._name({"mesh": asdict(mesh), "rank": rank, "host": socket.gethostname()})
        self._set(magic=_MAGIC)  # last: from here on it can be read
        self._is_over = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def enter(
        self,
        operation: str,
        axes: tuple[str, ...],
        size_bytes: int,
        purpose: str,
        *,
        waits: bool = True,
    ) -> int:
        """A collective begins.

        Args:
            operation: one of `OPERATIONS`.
            axes: of the mesh; none: all ranks.
            size_bytes: as cost models count them.
            purpose: what for.
            waits: whether the rank waits for its end from now on.

        Returns:
            The call's number, which `waits` and `leaves` take.
        """
        channel = self._channels.get(axes)
        if channel is None:
            channel = self._new_channel(axes, {"axes": axes})
        return self._enter(operation, channel, size_bytes, purpose, waits=waits)

    def enter_way(
        self, operation: str, axis: str, ends: tuple[int, int], size_bytes: int, purpose: str
    ) -> int:
        """A send or a receive begins; the rank does not wait for its end yet.

        Args:
            operation: which of both.
            axis: of the mesh.
            ends: the ranks of the source and of the destination.
            size_bytes: of the tensor.
            purpose: what is sent; what one rank sends another for one purpose is in order.
        """
        key = (axis, ends, purpose)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._new_channel(key, {"axes": (axis,), "ends": ends, "purpose": purpose})
        return self._enter(operation, channel, size_bytes, purpose, waits=False)

    def waits(self, number: int) -> None:
        """The rank begins to wait for the end of a call."""
        self._stamp(number, _WAIT)

    def leaves(self, number: int) -> None:
        """The rank goes on after a call."""
        self._stamp(number, _LEAVE)

    @contextmanager
    def phase(self, phase: Phase) -> Generator[None]:
        """The rank is at something; then at what it was at before."""
        before = self._phase
        self._turn_to(phase)
        try:
            yield
        finally:
            self._turn_to(before)

    def begin_training(self) -> None:
        """All is ready, and the first step begins."""
        self._turn_to("training")
        self._step_begin = time.monotonic_ns()

    def finish_step(self, step: int) -> None:
        """A step has ended, and the next one begins."""
        words, now = self._words, time.monotonic_ns()
        count = words[_WORDS["num_steps"]]
        at = _STEPS + count % _NUM_STEPS * _STEP_WORDS
        words[at] = 0  # nobody reads it while it is written
        words[at + 1], words[at + 2], words[at + 3] = self._step_begin, now, self._is_plain
        words[at] = step
        self._set(num_steps=count + 1, step=step, step_end=now)
        self._step_begin, self._is_plain = now, True

    def close(self, state: State) -> None:
        """The rank ends: it says how, and signs no more."""
        self._is_over.set()
        self._set(state=STATES.index(state), heartbeat=time.monotonic_ns())

    def _enter(
        self, operation: str, channel: int, size_bytes: int, purpose: str, *, waits: bool
    ) -> int:
        words = self._words
        named = self._purposes.get(purpose)
        if named is None:
            named = self._new_purpose(purpose)
        sequence = words[_COUNTERS + channel] + 1
        number = words[_WORDS["num_calls"]] + 1
        words[_WORDS["num_calls"]] = number
        words[_COUNTERS + channel] = sequence
        now = time.monotonic_ns()
        words[_WORDS["last_call"]] = now
        _SLOT.pack_into(
            self._map,
            _SLOTS + number % NUM_SLOTS * _SLOT.size,
            number,
            sequence,
            self._operations[operation],
            self._phase_code,
            channel,
            named,
            size_bytes,
            now,
            now if waits else 0,
            0,
            number,
        )
        return number

    def _stamp(self, number: int, word: int) -> None:
        at = (_SLOTS + number % NUM_SLOTS * _SLOT.size) // _WORD
        if self._words[at] == number:  # else so many calls have come since that it is forgotten
            self._words[at + word] = time.monotonic_ns()

    def _turn_to(self, phase: Phase) -> None:
        self._phase, self._phase_code = phase, PHASES.index(phase)
        self._is_plain = False
        self._set(phase=self._phase_code, phase_since=time.monotonic_ns())

    def _new_channel(self, key: tuple[Any, ...], entry: dict[str, Any]) -> int:
        number = len(self._channels)
        assert number < _NUM_COUNTERS, f"a ring has room for {_NUM_COUNTERS} channels"
        self._name({"channel": entry})
        self._channels[key] = number
        return number

    def _new_purpose(self, purpose: str) -> int:
        self._name({"purpose": purpose})
        return self._purposes.setdefault(purpose, len(self._purposes))

    def _name(self, entry: dict[str, Any]) -> None:
        line = (json.dumps(entry) + "\n").encode()
        used = self._words[_WORDS["names_bytes"]]
        assert used + len(line) <= _NAMES_BYTES, "a ring has no room for more names"
        self._map[_NAMES + used : _NAMES + used + len(line)] = line
        self._set(names_bytes=used + len(line))

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._words[_WORDS[name]] = value

    def _beat(self) -> None:
        heartbeat = _WORDS["heartbeat"]
        while not self._is_over.wait(HEARTBEAT_S):
            self._words[heartbeat] = time.monotonic_ns()


def _new_map(path: Path) -> mmap.mmap:
    """A new file of zeros under a path, mapped; readers of an old one keep that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = _SLOTS + NUM_SLOTS * _SLOT.size
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w+b") as file:
        file.truncate(size)
        mapped = mmap.mmap(file.fileno(), size)
    temporary.replace(path)
    return mapped


class _Names(NamedTuple):
    """What the numbers in a ring mean."""

    mesh: MeshConfig
    rank: int
    host: str
    channels: list[Channel]
    purposes: list[str]


class RingReader:
    """Reads a ring that a process writes, or has written.

    Args:
        path: of the ring.

    Raises:
        OSError: there is none.
        DataError: it is no ring, or of another version.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._inode = os.fstat(file.fileno()).st_ino
            content = memoryview(b"")
            if os.fstat(file.fileno()).st_size == _SLOTS + NUM_SLOTS * _SLOT.size:
                content = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        words = np.frombuffer(content[:_NAMES], dtype="<i8")
        if not len(words) or (words[0], words[1]) != (_MAGIC, _FORMAT):
            hint = "watch a run of this version"
            raise DataError(f"{path} is no ring of format {_FORMAT}", hint=hint)
        self.path = path
        self._content, self._words = content, words
        self._slots = np.frombuffer(content[_SLOTS:], dtype=_SLOT_TYPE)
        self._names_bytes = 0
        self._names = self._read_names()

    @property
    def mesh(self) -> MeshConfig:
        """Of the run."""
        return self._names.mesh

    @property
    def host(self) -> str:
        """Where its process runs."""
        return self._names.host

    @property
    def pid(self) -> int:
        """Of its process."""
        return int(self._words[_WORDS["pid"]])

    def is_current(self) -> bool:
        """Whether the rank has not begun another ring since, as it does when started again."""
        try:
            return self.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def read(self, *, is_whole: bool = True) -> RankTrace:
        """What is in it now.

        Args:
            is_whole: whether finished calls are wanted too, and not the open ones alone.
        """
        word = {name: int(self._words[index]) for name, index in _WORDS.items()}
        rows = self._calls(is_whole=is_whole)
        if self._words[_WORDS["names_bytes"]] != self._names_bytes:  # after what may need them
            self._names = self._read_names()
        names = self._names
        offset = word["epoch_offset"]
        counters = self._words[_COUNTERS : _COUNTERS + len(names.channels)].tolist()
        return RankTrace(
            rank=names.rank,
            pid=word["pid"],
            host=names.host,
            started_s=_seconds(word["started"], offset),
            heartbeat_s=_seconds(word["heartbeat"], offset),
            phase=PHASES[word["phase"]],
            phase_s=_seconds(word["phase_since"], offset),
            state=STATES[word["state"]],
            step=word["step"],
            step_s=_seconds(word["step_end"], offset) if word["step"] else 0.0,
            last_call_s=_seconds(word["last_call"], offset) if word["last_call"] else 0.0,
            steps=self._steps(word["num_steps"], offset),
            reached=dict(zip(names.channels, counters, strict=True)),
            calls=tuple(_call(row, names, offset) for row in rows),
        )

    def _calls(self, *, is_whole: bool) -> list[tuple[int, ...]]:
        """The rows of whole calls, oldest first."""
        wanted = self._slots["number"] > 0
        if not is_whole:
            wanted &= self._slots["leave"] == 0
        found = self._slots[wanted]  # a copy: nothing changes from here on
        found = found[found["number"] == found["again"]]
        return found[np.argsort(found["number"])].tolist()

    def _steps(self, count: int, offset: int) -> tuple[StepTimes, ...]:
        """The last steps; one that is being written is left out."""
        table = self._words[_STEPS:_COUNTERS].reshape(_NUM_STEPS, _STEP_WORDS).copy()
        kept = range(max(0, count - _NUM_STEPS), count)
        rows = [tuple(table[index % _NUM_STEPS].tolist()) for index in kept]
        return tuple(
            StepTimes(step, _seconds(begin, offset), _seconds(end, offset), bool(is_plain))
            for step, begin, end, is_plain in rows
            if step
        )

    def _read_names(self) -> _Names:
        self._names_bytes = int(self._words[_WORDS["names_bytes"]])
        text = bytes(self._content[_NAMES : _NAMES + self._names_bytes]).decode()
        first, *entries = [json.loads(line) for line in text.splitlines()]
        mesh, rank = MeshConfig(**first["mesh"]), first["rank"]
        channels = [_channel(e["channel"], mesh, rank) for e in entries if "channel" in e]
        purposes = [entry["purpose"] for entry in entries if "purpose" in entry]
        return _Names(mesh, rank, first["host"], channels, purposes)


def _channel(entry: dict[str, Any], mesh: MeshConfig, rank: int) -> Channel:
    axes = tuple(entry["axes"])
    if "ends" in entry:
        return Channel(axes, tuple(entry["ends"]), entry["purpose"])
    return Channel(axes, members_of(mesh, rank, axes))


def members_of(mesh: MeshConfig, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
    """The ranks that differ from one only on some axes; of no axes: all ranks."""
    if not axes:
        return tuple(range(mesh.num_ranks))
    return next(members for members in mesh.groups(axes) if rank in members)


def _call(row: tuple[int, ...], names: _Names, offset: int) -> Call:
    _, sequence, operation, phase, channel, purpose, size_bytes, enter, wait, leave, _ = row
    return Call(
        operation=OPERATIONS[operation],
        channel=names.channels[channel],
        sequence=sequence,
        purpose=names.purposes[purpose],
        size_bytes=size_bytes,
        phase=PHASES[phase],
        enter_s=_seconds(enter, offset),
        wait_s=_seconds(wait, offset) if wait else None,
        leave_s=_seconds(leave, offset) if leave else None,
    )


def _seconds(clock_ns: int, offset_ns: int) -> float:
    return (clock_ns + offset_ns) / 1e9
