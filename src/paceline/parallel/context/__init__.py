"""Context parallelism: how attention reaches the tokens that other ranks have."""

from paceline.core.registry import NameTable

METHODS = NameTable(
    "method of context parallelism",
    {
        "ring": "paceline.parallel.context.ring:METHOD",
        "zigzag-ring": "paceline.parallel.context.zigzag_ring:METHOD",
        "ulysses": "paceline.parallel.context.ulysses:METHOD",
        "ulysses-ring": "paceline.parallel.context.ulysses_ring:METHOD",
        "token-ring": "paceline.parallel.context.token_ring:METHOD",
    },
)
"""Name to its `paceline.parallel.context.base.Method`."""
