"""What a micro-batch holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""Label of positions that have no loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of one micro-batch on one rank.

    Attributes:
        tokens_BT: token ids.
        labels_BT: the token that follows each position, or `IGNORED`.
        documents_BT: number of each token's document in its row; -1 for padding. Of the whole
            rows, whatever part of them `places_T` names.
        places_T: the place in its row of each token of the batch; None: all, in order.
    """

    tokens_BT: Tensor
    labels_BT: Tensor
    documents_BT: Tensor
    places_T: Tensor | None = None

    @property
    def count(self) -> int:
        """Positions that have a loss."""
        return int((self.labels_BT != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.tokens_BT.to(device),
            self.labels_BT.to(device),
            self.documents_BT.to(device),
            None if self.places_T is None else self.places_T.to(device),
        )
