"""Benchmarks: one file a claim, beside a peer or a limit, measured in one run."""

from paceline.core.registry import NameTable

BENCHMARKS = NameTable("benchmark", {"generate": "paceline.bench.generate:run"})
"""Name to ``run(against, model, dtype) -> Outcome``."""
