"""The units of a decoder: what is gathered, reduced and freed together, and when.

A unit is a block, or what follows the last block (norm and head), or what comes before the first
(embeddings and prelude), which other units may use too: a tied head does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paceline.models.decoder import Decoder

_LAST = ("norm", "head")


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Parameters that are used together.

    Attributes:
        name: of the module, or ``first`` or ``last`` for what is outside the blocks.
        parameters: all of them, in the order of the model.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]

    @property
    def is_outer(self) -> bool:
        """Whether it is open as long as the pass, since other units may use it."""
        return self.name == "first"


class Watcher(Protocol):
    """What is told of passes through units, on all ranks in the same order."""

    def before_forward(self, unit: Unit) -> None: ...

    def after_forward(self, unit: Unit) -> None: ...

    def before_backward(self, unit: Unit) -> None:
        """The gradient of the unit's output is there.

        A unit's backward pass ends when another's begins or the whole pass is over; the first
        unit's, only then. It may begin no more than that: where nothing needs a gradient.
        """
        ...


def units_of(model: Decoder) -> list[Unit]:
    """The units of this rank's part of a model, in the order of use; none is empty."""
    groups: dict[str, list[nn.Parameter]] = {"first": []}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        key = ".".join(parts[:2]) if parts[0] == "blocks" else "first"
        groups.setdefault("last" if parts[0] in _LAST else key, []).append(parameter)
    return [Unit(name, tuple(group)) for name, group in groups.items() if group]


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
        model.register_forward_pre_hook(self._enter_model)
        for name, block in model.blocks.named_children():
            if (unit := self._named.get(f"blocks.{name}")) is not None:
                block.register_forward_pre_hook(self._entry(unit))
                block.register_forward_hook(self._exit(unit))
        if "last" in self._named:
            model.norm.register_forward_pre_hook(self._enter_last)
        model.register_forward_hook(self._leave_model)

    @torch.compiler.disable
    def _enter_model(self, _module: nn.Module, _inputs: Any) -> None:
        self._open = []
        if "first" in self._named:
            self._enter(self._named["first"])

    @torch.compiler.disable
    def _enter_last(self, _module: nn.Module, _inputs: Any) -> None:
        self._enter(self._named["last"])

    def _enter(self, unit: Unit) -> None:
        self._open.append(unit)
        self._watcher.before_forward(unit)

    @torch.compiler.disable
    def _leave_model(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        for unit in self._open:
            self._watcher.after_forward(unit)
        return _Border.apply(output, self._watcher, self._open)

    def _entry(self, unit: Unit) -> Callable[[nn.Module, Any], None]:
        @torch.compiler.disable
        def hook(_module: nn.Module, _inputs: Any) -> None:
            self._watcher.before_forward(unit)

        return hook

    def _exit(self, unit: Unit) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        @torch.compiler.disable
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            self._watcher.after_forward(unit)
            return _Border.apply(output, self._watcher, [unit])

        return hook


class _Border(torch.autograd.Function):
    """The identity; its backward pass comes before that of what made its input."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, watcher: Watcher, units: list[Unit]) -> Tensor:
        ctx.watcher, ctx.units = watcher, units
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None]:
        for unit in ctx.units:
            ctx.watcher.before_backward(unit)
        return grad_outputs[0], None, None
