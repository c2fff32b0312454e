"""Benchmarks: one file a claim, beside a peer or a limit, measured in one run."""

from paceline.core.registry import NameTable

BENCHMARKS = NameTable(
    "benchmark",
    {
        "generate": "paceline.bench.generate:run",
        "serve": "paceline.bench.serve:run",
        "adapters": "paceline.bench.adapters:run",
        "decode": "paceline.bench.decode:run",
        "train": "paceline.bench.train:run",
        "axes": "paceline.bench.axes:run",
        "vocabulary": "paceline.bench.vocabulary:run",
        "ladder": "paceline.bench.ladder:run",
        "watch": "paceline.bench.watch:run",
        "checkpoint": "paceline.bench.checkpoint:run",
        "policies": "paceline.bench.policies:run",
        "serve-ranks": "paceline.bench.serve_ranks:run",
    },
)
"""Name to ``run(...)``, which gives an `Outcome`, or several by name, and whose keywords are the
options that it reads; each has a default."""
