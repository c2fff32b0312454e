"""The forward passes of layers at the border between what is whole and what is split.

Each stands in the place of a layer's own ``forward``, reads the layer's parameters as they are at
the moment, so that they may be gathered block by block, and knows the other ranks as a `Border`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from paceline.parallel.tensor.border import Border
from paceline.plan.module_graph import Leaf
from paceline.plan.module_rules import Group, Rules
from paceline.plan.tensor_rules import WHOLE, Split


class Role(ABC):
    """A layer's forward pass.

    Args:
        layer: whose.
        leaf: what it computes.
        rules: how it is split.
        border: to the other ranks.
    """

    def __init__(self, layer: nn.Module, leaf: Leaf, rules: Rules, border: Border) -> None:
        self.layer = layer
        self.leaf = leaf
        self.border = border
        self.split = rules.taken.get(leaf.name, rules.splits.get(f"{leaf.name}.weight", WHOLE))
        self._splits = {
            kind: split
            for kind in leaf.shapes
            if (split := rules.splits.get(f"{leaf.name}.{kind}", WHOLE)).copied
        }

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameter(self, kind: str) -> Tensor | None:
        """The layer's weight or bias; the gradients of copied rows are summed."""
        value = getattr(self.layer, kind, None)
        split = self._splits.get(kind)
        return value if value is None or split is None else self.border.share(value, split)

    def product(self, x: Tensor, *, bias: bool) -> Tensor:
        """What the layer computes from a part of its matrix."""
        weight, term = self.parameter("weight"), self.parameter("bias") if bias else None
        assert weight is not None, f"{self.leaf.name} has no weight"
        return functional.linear(x, weight.T if self.leaf.kind == "transposed" else weight, term)

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass that this one stands in for."""
        return type(self.layer).forward(self.layer, *args, **kwargs)


class Entrance:
    """Where a whole tensor enters a group: once, however many of the group's layers read it."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Tensor] | None = None

    def enter(self, x: Tensor, border: Border) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = (x, border.enter(x))
        return self._last[1]

    def forget(self) -> None:
        """The group has ended: what has entered need not be kept."""
        self._last = None


class Column(Role):
    """Whole input, split output."""

    entrance = Entrance()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.product(self.entrance.enter(_input(args, kwargs), self.border), bias=True)


class Row(Role):
    """Split input; the output is a sum over ranks, to which the bias is added once."""

    entrance = Entrance()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.entrance.forget()
        whole = self.border.close(self.leaf.name, self.product(self.part(args, kwargs), bias=False))
        bias = self.parameter("bias")
        return whole if bias is None else whole + bias

    def part(self, args: Any, kwargs: Any) -> Tensor:
        return _input(args, kwargs)


class Scattered(Row):
    """Whole input, of which each rank takes its share."""

    def part(self, args: Any, kwargs: Any) -> Tensor:
        return self.border.take(_input(args, kwargs), self.split)


class Gathered(Role):
    """Whole input, output split and gathered."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        columns = self.product(self.border.enter(_input(args, kwargs)), bias=True)
        return self.border.gather(self.leaf.name, columns, self.split)


class Vocabulary(Role):
    """An embedding of which each rank has some words; those of others are zeros here."""

    def __init__(self, layer: nn.Module, leaf: Leaf, rules: Rules, border: Border) -> None:
        super().__init__(layer, leaf, rules, border)
        self.words = range(0)  # set when the layer is split

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        ids = _input(args, kwargs)
        is_own = (ids >= self.words.start) & (ids < self.words.stop)
        rows: Tensor = self.whole((ids - self.words.start).where(is_own, 0))
        return self.border.close(self.leaf.name, rows.masked_fill(~is_own[..., None], 0.0))


class Inside(Role):
    """Between a group's layers, with whole parameters: gradients of all ranks' parts are summed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._entered():
            return self.whole(*args, **kwargs)

    @contextmanager
    def _entered(self) -> Generator[None]:
        # An attribute of the object hides the parameter of the same name.
        names = [name for name, _ in self.layer.named_parameters(recurse=False)]
        try:
            for name in names:
                self.layer.__dict__[name] = self.border.enter(self.layer.get_parameter(name))
            yield
        finally:
            for name in names:
                self.layer.__dict__.pop(name, None)


class Taken(Role):
    """All of it whole; each rank goes on with its share of the output."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.border.take(self.whole(*args, **kwargs), self.split)


ROLES: dict[str, type[Role]] = {
    "column": Column,
    "row": Row,
    "gathered": Gathered,
    "scattered": Scattered,
    "vocabulary": Vocabulary,
    "inside": Inside,
    "taken": Taken,
}


def make_roles(
    module: nn.Module, leaves: dict[str, Leaf], rules: Rules, border: Border, rank: int
) -> dict[str, Role]:
    """The roles of all layers that have one."""
    roles = {
        name: ROLES[role](module.get_submodule(name), leaves[name], rules, border)
        for name, role in rules.roles.items()
    }
    for role in roles.values():
        if isinstance(role, Vocabulary):
            (role.words,) = role.split.shares[rank]
    for group in rules.groups:
        _join(group, roles)
    return roles


def _join(group: Group, roles: dict[str, Role]) -> None:
    entrance = Entrance()
    for name in (*group.columns, *group.rows):
        role = roles[name]
        assert isinstance(role, Column | Row), f"{name} is no member of a group"
        role.entrance = entrance


def _input(args: Any, kwargs: Any) -> Tensor:
    """The one tensor that a layer is called with."""
    (x, *_) = (*args, *kwargs.values())
    return x


def local_part(parameter: Tensor, split: Split, rank: int) -> Tensor:
    """A rank's part of a parameter, in memory of its own."""
    if split.dim is None:
        return parameter.detach()
    indices = torch.tensor(split.indices(rank), device=parameter.device)
    return parameter.detach().index_select(split.dim, indices)
