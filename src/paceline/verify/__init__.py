"""Certified exact: a plan's gradients and weights against one process in float64.

The package is a verb too: ``paceline.verify(model, plan)`` calls it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from paceline.plan.plan import Plan
    from paceline.verify.certify import Certificate
    from paceline.verify.module import Forward


def verify(
    model: str | nn.Module, plan: Plan | None = None, *, forward: Forward | None = None
) -> Certificate:
    """Compares what a plan computes with what one process does, in float64.

    Args:
        model: a MODEL, which is trained as `paceline train` would; or a module, which is trained
            as a loop around `paceline.parallelize` would.
        plan: its layout is certified.
        forward: how a module is called; see `paceline.verify.module.certify_module`.

    Returns:
        Errors of gradients, weights and losses, and whether all are within the bound.

    Raises:
        ConfigError: the plan has problems.
        UsageError: no such model, or a module that cannot be called.
    """
    from paceline.core.errors import UsageError
    from paceline.models.hub import resolve
    from paceline.plan.check import require
    from paceline.plan.plan import Plan
    from paceline.verify.certify import certify
    from paceline.verify.module import certify_module

    plan = plan or Plan()
    if not isinstance(model, str):
        return certify_module(model, plan, forward=forward)
    if forward is not None:
        raise UsageError("forward is for modules; a MODEL has its own")
    source = resolve(model)
    require(plan, source.spec)
    return certify(plan, source.spec, source.weights)


class _Verb(ModuleType):
    """A module that can be called: an import of what is in it would else hide the verb."""

    def __call__(
        self,
        model: str | nn.Module,
        plan: Plan | None = None,
        *,
        forward: Forward | None = None,
    ) -> Certificate:
        return verify(model, plan, forward=forward)


sys.modules[__name__].__class__ = _Verb
