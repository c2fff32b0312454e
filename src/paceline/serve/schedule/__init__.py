"""Policies: which request gets how many tokens of a step. Pure functions over plain data."""

from paceline.core.registry import NameTable

POLICIES = NameTable(
    "serving policy",
    {
        "stall-free": "paceline.serve.schedule.stall_free:stall_free",
        "serial": "paceline.serve.schedule.serial:serial",
        "prefill-first": "paceline.serve.schedule.prefill_first:prefill_first",
        "static": "paceline.serve.schedule.static:static",
        "temporal-fusion": "paceline.serve.schedule.temporal_fusion:temporal_fusion",
        "global-prefix": "paceline.serve.schedule.global_prefix:global_prefix",
    },
)
"""Name to a `paceline.serve.schedule.base.Policy`."""
