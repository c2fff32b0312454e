"""``paceline.simulate``: not built."""

from __future__ import annotations

from typing import NoReturn

from paceline.core.errors import UsageError


def simulate(*_arguments: object, **_options: object) -> NoReturn:
    """Will predict times and memory of a plan on a cluster.

    Raises:
        UsageError: always; it is not built.
    """
    hint = "run a few steps: each record has its time, tokens per second and memory"
    raise UsageError("simulate is not built in this version", hint=hint)
