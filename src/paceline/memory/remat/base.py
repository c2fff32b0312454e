"""The contract of rematerialisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import checkpoint

Around = Callable[..., Any]
"""``around(function, *arguments) -> function(*arguments)``, computed in whatever way."""


@dataclass(frozen=True, slots=True)
class Remat:
    """What calls the parts of a model.

    Attributes:
        around_block: calls a block; None: nothing does.
        around_core: calls the core of an attention; None: nothing does.
    """

    around_block: Around | None = None
    around_core: Around | None = None


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of which only the arguments are kept for the backward pass."""
    # Nothing draws numbers by call order, so there is no generator to wind back.
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
