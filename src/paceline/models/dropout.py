"""Whether a module drops something at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from paceline.models.function_names import plain_name


class DropoutFinder(TorchFunctionMode):
    """Sees whether anything is dropped at random."""

    def __init__(self) -> None:
        super().__init__()
        self.has_found = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        options = kwargs or {}
        name = plain_name(func)
        if "dropout" in name:
            rate = args[1] if len(args) > 1 else options.get("p", 0.5)
            is_on = (
                args[2] if len(args) > 2 else options.get("training", options.get("train", True))
            )
            self.has_found |= bool(is_on) and rate > 0
        elif name == "scaled_dot_product_attention":
            rate = args[4] if len(args) > 4 else options.get("dropout_p", 0.0)
            self.has_found |= rate > 0
        return func(*args, **options)
