"""Pure data that every other package speaks: no torch, no devices, no side effects.

The package will be a verb too: ``paceline.plan(...)`` says that it is not built.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NoReturn

from paceline.core.errors import UsageError


class _Verb(ModuleType):
    """A module that can be called: an import of what is in it would else hide the verb."""

    def __call__(self, *_arguments: object, **_options: object) -> NoReturn:
        """Will propose plans for a model, a cluster and a workload.

        Raises:
            UsageError: always; it is not built.
        """
        hint = "write one: paceline.Plan(...) or a plan file; `paceline check` lists its problems"
        raise UsageError("plan is not built in this version", hint=hint)


sys.modules[__name__].__class__ = _Verb
