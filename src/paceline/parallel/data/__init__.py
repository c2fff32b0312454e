"""Data parallelism: how the ranks that read different data share state."""

from paceline.core.registry import NameTable

STAGES = NameTable(
    "ZeRO stage",
    {
        "0": "paceline.parallel.data.replicated:Replicated",
        "1": "paceline.parallel.data.optimizer_sharded:OptimizerSharded",
        "2": "paceline.parallel.data.gradient_sharded:GradientSharded",
        "3": "paceline.parallel.data.fully_sharded:FullySharded",
        "3-own": "paceline.parallel.data.parameter_sharded:ParameterSharded",
    },
)
"""ZeRO stage, as `Plan.zero_technique` says, to its `paceline.parallel.data.base.DataParallel`."""
