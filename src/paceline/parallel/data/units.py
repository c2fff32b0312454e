"""The units of a decoder: what is gathered, reduced and freed together, and when.

A unit is a block, or what comes before the first block (embeddings and prelude), or what follows
the last one (norm and head). The first and the last have a tied embedding in common. Embedding and
head are a unit of their own where they are in no stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from paceline.models.decoder import Decoder
from paceline.models.ladder import Stream

FIRST, LAST, WORDS = "first", "last", "words"

F = TypeVar("F", bound=Callable[..., Any])


def _eager(function: F) -> F:
    """Keeps a hook out of a compiled block's graph: it is of what is done, not of values."""
    return cast("F", torch.compiler.disable(function))


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Parameters that are used together.

    Attributes:
        name: of the block, or `FIRST`, `LAST` or `WORDS`.
        parameters: all of them, in the order of the model.
        shared: those that another unit uses too.
        looked_up: those of which the backward pass reads no values.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    shared: frozenset[nn.Parameter] = frozenset()
    looked_up: frozenset[nn.Parameter] = frozenset()

    @property
    def needed_backward(self) -> tuple[nn.Parameter, ...]:
        """The parameters whose values the backward pass reads."""
        return tuple(p for p in self.parameters if p not in self.looked_up)


class Watcher(Protocol):
    """What is told of passes through units, on all ranks in the same order."""

    def before_forward(self, unit: Unit) -> None: ...

    def after_forward(self, unit: Unit) -> None: ...

    def before_backward(self, unit: Unit) -> None:
        """The gradient of the unit's output is there.

        A unit's backward pass ends when another's begins or the whole pass is over; the first
        unit's, only then. Where nothing needs a gradient, none begins.
        """
        ...


def units_of(model: Decoder) -> list[Unit]:
    """The units of this rank's part of a model; none is empty."""
    named = dict(model.named_parameters())
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        unit = _unit_of(name, is_apart=model.vocabulary.is_apart)
        groups.setdefault(unit, []).append(parameter)
    shared: frozenset[nn.Parameter] = frozenset()
    if model.spec.tied_embeddings and LAST in groups and WORDS not in groups:
        shared = frozenset([named["embedding.weight"]])
        groups[LAST] += shared
    children = model.named_children()
    looked_up = frozenset(
        named[f"{name}.weight"] for name, child in children if isinstance(child, nn.Embedding)
    )
    return [
        Unit(
            name,
            tuple(group),
            shared & frozenset(group),
            looked_up & frozenset(group) if name == FIRST else frozenset(),
        )
        for name, group in groups.items()
    ]


def _unit_of(name: str, *, is_apart: bool) -> str:
    top, *rest = name.split(".")
    if is_apart and top in ("embedding", "head"):
        return WORDS
    if top == "blocks":
        return f"{top}.{rest[0]}"
    return LAST if top in ("norm", "head") else FIRST


class Watch:
    """Tells a watcher of every pass through a model from now on.

    Borders are identities in autograd's graph, at the outputs of units: so the backward pass is
    seen on all ranks alike, whichever parameters have a gradient there.

    Args:
        model: gets hooks.
        units: of the model.
        watcher: is told.
    """

    def __init__(self, model: Decoder, units: list[Unit], watcher: Watcher) -> None:
        self._watcher = watcher
        self._named = {unit.name: unit for unit in units}
        self._open: list[Unit] = []  # units outside the blocks that this forward pass has entered
        model.register_forward_pre_hook(self._enter_first)
        for name, block in model.blocks.named_children():
            if (unit := self._named.get(f"blocks.{name}")) is not None:
                block.register_forward_pre_hook(self._entry(unit))
                block.register_forward_hook(self._exit(unit))
        if LAST in self._named:
            model.norm.register_forward_pre_hook(self._enter_last)
        model.register_forward_hook(self._leave_model)

    def around(self, run: Callable[[], Tensor], *, is_first: bool) -> Tensor:
        """Runs a stage that is not called as a model; `is_first`: it looks tokens up."""
        self._open = []
        if is_first:
            self._enter(FIRST)
        return self._leave(run())

    @_eager
    def _enter_first(self, _module: nn.Module, _inputs: Any) -> None:
        self._open = []
        self._enter(FIRST)

    @_eager
    def _enter_last(self, _module: nn.Module, _inputs: Any) -> None:
        self._enter(LAST)

    @_eager
    def _leave_model(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self._leave(output)

    def _enter(self, name: str) -> None:
        if name in self._named:
            self._open.append(self._named[name])
            self._watcher.before_forward(self._named[name])

    def _leave(self, output: Tensor) -> Tensor:
        for unit in self._open:
            self._watcher.after_forward(unit)
        return _Border.apply(self._watcher, self._open, output)

    def _entry(self, unit: Unit) -> Callable[[nn.Module, Any], None]:
        @_eager
        def hook(_module: nn.Module, _inputs: Any) -> None:
            self._watcher.before_forward(unit)

        return hook

    def _exit(self, unit: Unit) -> Callable[[nn.Module, Any, Tensor | Stream], Tensor | Stream]:
        @_eager
        def hook(_module: nn.Module, _inputs: Any, output: Tensor | Stream) -> Tensor | Stream:
            self._watcher.after_forward(unit)
            if isinstance(output, Tensor):
                return _Border.apply(self._watcher, [unit], output)
            both: Any = _Border.apply(self._watcher, [unit], output.x_BTD, output.output_BTD)
            return output._replace(x_BTD=both[0], output_BTD=both[1])

        return hook


class _Border(torch.autograd.Function):
    """The identity; its backward pass comes before that of what made its input."""

    @staticmethod
    def forward(ctx: Any, watcher: Watcher, units: list[Unit], *outputs: Tensor) -> Any:
        ctx.watcher, ctx.units = watcher, units
        same = [output.view_as(output) for output in outputs]
        return tuple(same) if len(same) > 1 else same[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        for unit in ctx.units:
            ctx.watcher.before_backward(unit)
        return None, None, *grad_outputs
