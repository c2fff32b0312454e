"""Benchmarks: one file a claim, beside a peer or a limit, measured in one run."""

from paceline.core.registry import NameTable

BENCHMARKS = NameTable(
    "benchmark",
    {"generate": "paceline.bench.generate:run", "train": "paceline.bench.train:run"},
)
"""Name to ``run(against, model, dtype) -> Outcome``."""
