"""What ranks send each other, written down: operation, axes, bytes, purpose."""

from __future__ import annotations

from typing import NamedTuple


class Transfer(NamedTuple):
    """One collective, as this rank called it."""

    operation: str
    axes: tuple[str, ...]
    size_bytes: int
    purpose: str


class Traffic:
    """The collectives of one rank, in order."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []

    def add(self, operation: str, axes: tuple[str, ...], size_bytes: int, purpose: str) -> None:
        self.transfers.append(Transfer(operation, axes, size_bytes, purpose))

    def total_bytes(self, purpose: str) -> int:
        """Bytes given to the collectives of one purpose."""
        return sum(t.size_bytes for t in self.transfers if t.purpose == purpose)
