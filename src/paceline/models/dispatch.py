"""How rows of tokens come to the experts that they go to, and how what these make comes back.

The mixture sorts rows by expert; where experts are is not its business. The plain way is below;
`paceline.parallel.expert` has one that crosses ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Arrived:
    """Rows that have come to the experts that are here.

    Attributes:
        rows_RD: sorted by expert.
        counts: rows of each of these experts, in order.
        combine: brings what the experts have made of the rows, (R, D), back to where they came
            from, in the order in which they were given.
    """

    rows_RD: Tensor
    counts: tuple[int, ...]
    combine: Callable[[Tensor], Tensor]


class Dispatch(Protocol):
    """Sends rows to experts.

    Args:
        rows_RD: sorted by expert, a row for each choice of a token.
        counts_E: rows of each expert of the layer; int64.

    Returns:
        The rows of the experts that are here, of any number.
    """

    def __call__(self, rows_RD: Tensor, counts_E: Tensor) -> Arrived: ...


def dispatch_here(rows_RD: Tensor, counts_E: Tensor) -> Arrived:
    """All experts are here."""
    return Arrived(rows_RD, tuple(counts_E.tolist()), lambda outputs_RD: outputs_RD)
