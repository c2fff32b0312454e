"""Policies: which request gets how many tokens of a step. Pure functions over plain data."""

from paceline.core.registry import NameTable

POLICIES = NameTable(
    "serving policy",
    {
        "stall-free": "paceline.serve.schedule.stall_free:stall_free",
        "serial": "paceline.serve.schedule.serial:serial",
    },
)
"""Name to a `paceline.serve.schedule.base.Policy`."""
