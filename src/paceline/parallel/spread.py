"""How modules have been laid over ranks: clipped gradients and whole states need to know."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from paceline.core.errors import UsageError
from paceline.dist.world import World
from paceline.plan.module_rules import Rules
from paceline.plan.tensor_rules import WHOLE, Split


@dataclass(frozen=True, slots=True)
class Spread:
    """How a module is laid over ranks.

    Attributes:
        world: the ranks.
        rules: how tensor ranks share it; None where there is one.
    """

    world: World
    rules: Rules | None

    def split_of(self, name: str) -> Split:
        """How a parameter is split over tensor ranks."""
        return WHOLE if self.rules is None else self.rules.splits.get(name, WHOLE)


_SPREAD: WeakKeyDictionary[nn.Module, Spread] = WeakKeyDictionary()


def remember(module: nn.Module, spread: Spread) -> None:
    """Notes how a module has been laid."""
    _SPREAD[module] = spread


def inner_module(module: nn.Module) -> nn.Module:
    """The module itself, of what `paceline.parallelize` may have put around it."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def spread_of(module: nn.Module) -> Spread | None:
    """How a module has been laid over ranks; None for one that is whole in one process."""
    return _SPREAD.get(inner_module(module))


def tensor_rules_of(module: nn.Module) -> Rules:
    """How tensor ranks share a module that `paceline.parallelize` has split.

    Raises:
        UsageError: it has not been split.
    """
    spread = spread_of(module)
    if spread is None or spread.rules is None:
        message = f"{type(inner_module(module)).__name__} is not split over tensor ranks"
        raise UsageError(message, hint="parallelize(module, plan) with mesh.tp above 1")
    return spread.rules
