"""Tensors on their way to disk: copied into a buffer of host memory that is used again and again.

One thread copies, another writes; each waits for the other, the first for room, the second for
tensors. A buffer that is smaller than what is saved is a ring.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from paceline.core.errors import PacelineError
from paceline.kernels.device import HostCopies, host_buffer

_ALIGNMENT_BYTES = 64
_PAGE_BYTES = 4096


class Ring:
    """Room in a buffer, given back in the order in which it was given.

    Args:
        size_bytes: of the buffer.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._given: deque[tuple[int, int]] = deque()  # begin and end of each piece

    @property
    def used_bytes(self) -> int:
        """What pieces take."""
        return sum(end - begin for begin, end in self._given)

    def reserve(self, size_bytes: int) -> int | None:
        """Where a piece of this size begins; None while there is no room for it."""
        begin = self._room(size_bytes)
        if begin is not None:
            self._given.append((begin, begin + size_bytes))
        return begin

    def release(self) -> None:
        """Takes back the oldest piece."""
        self._given.popleft()

    def _room(self, size_bytes: int) -> int | None:
        if not self._given:
            return 0 if size_bytes <= self._size_bytes else None
        oldest, newest = self._given[0], self._given[-1]
        is_wrapped = newest[0] < oldest[0]
        limit = oldest[0] if is_wrapped else self._size_bytes
        if newest[1] + size_bytes <= limit:
            return newest[1]
        # A piece lies in one stretch: what is left at the end stays empty.
        return 0 if not is_wrapped and size_bytes <= oldest[0] else None


class Staging:
    """The buffer of a rank.

    Args:
        sizes_bytes: of the tensors of a save, in the order in which they are written.
        buffer_bytes: of the buffer; 0 for room for all of them.
        device: that they are on.

    Raises:
        PacelineError: a tensor is larger than the buffer.
    """

    def __init__(self, sizes_bytes: Sequence[int], buffer_bytes: int, device: torch.device) -> None:
        sizes = [aligned(size) for size in sizes_bytes]
        largest = max(sizes, default=0)
        if 0 < buffer_bytes < largest:
            raise PacelineError(
                f"checkpoint.buffer_bytes = {buffer_bytes}: a tensor of this rank needs {largest}",
                hint=f"use {largest} or more, or 0 for what the whole state needs",
            )
        self.size_bytes = min(buffer_bytes or sum(sizes), sum(sizes))
        self.copies = HostCopies(device)
        self._buffer = host_buffer(self.size_bytes, device).numpy()

    def fault_in(self) -> None:
        """Touches the buffer's memory, so that the first save need not wait for the kernel."""
        self._buffer[::_PAGE_BYTES] = 0

    def at(self, offset_bytes: int, like: Tensor) -> Tensor:
        """A place in the buffer, as a tensor with a storage of just its size.

        Torch clones, as it writes, a tensor that is a view of a larger storage.
        """
        flat = torch.frombuffer(
            self._buffer, dtype=like.dtype, count=like.numel(), offset=offset_bytes
        )
        return flat.view(like.shape)


class StagedTensors:
    """The tensors of one save.

    Args:
        staging: where they are copied to.
        sources: the live tensors, in the order in which they are written.

    Attributes:
        staged: set once no source is read any more.
        peak_bytes: the most that copies have taken at a time.
    """

    def __init__(self, staging: Staging, sources: Sequence[Tensor]) -> None:
        self._staging, self._sources = staging, sources
        self._ring = Ring(staging.size_bytes)
        self._copies: deque[Tensor] = deque()
        self._changed = threading.Condition()
        self._is_taken = False  # whether the oldest copy is being written
        self._failure: Exception | None = None
        self.staged = threading.Event()
        self.peak_bytes = 0
        staging.copies.follow()

    def stage(self) -> None:
        """Copies all tensors, as far as room lets it; the work of a thread."""
        try:
            for source in self._sources:
                offset = self._wait_for_room(aligned(source.nbytes))
                if offset is None:
                    return
                copy = self._staging.at(offset, source)
                self._staging.copies.copy(source, copy)
                with self._changed:
                    self._copies.append(copy)
                    self._changed.notify_all()
        except Exception as error:
            self.abandon(error)
        finally:
            self.staged.set()

    def take(self) -> Tensor:
        """The next tensor; the room of the one before is free again."""
        with self._changed:
            if self._is_taken:
                self._ring.release()
                self._changed.notify_all()
            self._is_taken = True
            self._changed.wait_for(lambda: self._copies or self._failure)
            if self._failure is not None:
                raise self._failure
            return self._copies.popleft()

    def abandon(self, failure: Exception) -> None:
        """Lets no thread wait any more: one of them has failed."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _wait_for_room(self, size_bytes: int) -> int | None:
        """Where a copy goes; None if nobody writes any more."""
        offset: int | None = None

        def is_over() -> bool:
            nonlocal offset
            offset = self._ring.reserve(size_bytes)
            return offset is not None or self._failure is not None

        with self._changed:
            self._changed.wait_for(is_over)
            self.peak_bytes = max(self.peak_bytes, self._ring.used_bytes)
        return offset if self._failure is None else None


def aligned(size_bytes: int) -> int:
    """What a tensor takes in a buffer: any dtype may follow it."""
    return -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
