"""What an adapter makes of a linear layer's product, as data: rows of one pass may differ in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """``(x down^T) up^T``.

    Attributes:
        down: (rank, inputs).
        up: (outputs, rank).
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """``y = scale ((input_scale x) W^T + b) + shift + (x down^T) up^T``, of a layer without it.

    What is None is left out.

    Attributes:
        input_scale: (inputs).
        scale: (outputs).
        shift: (outputs).
        low_rank: the factors.
    """

    input_scale: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    low_rank: LowRank | None = None

    @property
    def num_scale_bytes(self) -> int:
        """Of all but the factors."""
        return sum(value.nbytes for value in self._scales().values())

    def to(self, device: torch.device, dtype: torch.dtype) -> Update:
        """The same on a device and in a dtype."""
        scales = {name: value.to(device, dtype) for name, value in self._scales().items()}
        factors = self.low_rank and LowRank(*(one.to(device, dtype) for one in self.low_rank))
        return replace(self, low_rank=factors, **scales)

    def _scales(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def joined(parts: Sequence[tuple[slice, Update]], num_outputs: int) -> Update:
    """One update of a layer that computes several projections of one input.

    Args:
        parts: where each projection's outputs stand in the layer's, and its update.
        num_outputs: of the layer.
    """
    if len(parts) == 1 and parts[0][0] == slice(0, num_outputs):
        return parts[0][1]
    assert all(update.input_scale is None for _, update in parts), "they share one input"
    factors = [(columns, update.low_rank) for columns, update in parts if update.low_rank]
    return Update(
        scale=_spread([(columns, update.scale) for columns, update in parts], num_outputs, 1.0),
        shift=_spread([(columns, update.shift) for columns, update in parts], num_outputs, 0.0),
        low_rank=_side_by_side(factors, num_outputs) if factors else None,
    )


def _side_by_side(factors: Sequence[tuple[slice, LowRank]], num_outputs: int) -> LowRank:
    """Factors of several projections as one pair: each keeps ranks and outputs of its own."""
    down = torch.cat([low_rank.down for _, low_rank in factors])
    up = down.new_zeros(num_outputs, len(down))
    start = 0
    for columns, low_rank in factors:
        rank = len(low_rank.down)
        up[columns, start : start + rank] = low_rank.up
        start += rank
    return LowRank(down, up)


def _spread(
    values: Sequence[tuple[slice, Tensor | None]], num_outputs: int, neutral: float
) -> Tensor | None:
    """Numbers of some outputs as numbers of all."""
    there = [(columns, value) for columns, value in values if value is not None]
    if not there:
        return None
    whole = there[0][1].new_full((num_outputs,), neutral)
    for columns, value in there:
        whole[columns] = value
    return whole
