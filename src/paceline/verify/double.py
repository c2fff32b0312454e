"""Casts to float32 that go to float64, where a layout is certified in that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """What a module computes in float32, whatever its own precision is, it computes in float64.

    Else its rounding would hide errors of the layout below 1e-7.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        function = torch.Tensor.double if func is torch.Tensor.float else func
        options = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return function(*(_wider(value) for value in args), **options)


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
