"""Saved state: written whole, committed by one rename, checked before it is used."""

from paceline.core.registry import NameTable

SAVERS = NameTable(
    "checkpoint method",
    {
        "blocking": "paceline.checkpoint.blocking:build",
        "lazy": "paceline.checkpoint.lazy:build",
    },
)
"""Name to ``build(run, parts) -> Saver``."""
