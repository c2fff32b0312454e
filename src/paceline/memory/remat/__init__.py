"""Rematerialisation: what the backward pass computes again instead of keeping it."""

from paceline.core.registry import NameTable

REMAT = NameTable(
    "rematerialisation",
    {
        "none": "paceline.memory.remat.none:NONE",
        "selective": "paceline.memory.remat.selective:SELECTIVE",
        "full": "paceline.memory.remat.full:FULL",
        "full-keep-attention": "paceline.memory.remat.full_keep_attention:FULL_KEEP_ATTENTION",
    },
)
"""Name to its `paceline.memory.remat.base.Remat`."""
