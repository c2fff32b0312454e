"""Where each token of a batch stands: its position, and the document that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

PADDING = -1
"""Document number of padding tokens."""
SHARED = -2
"""Document number of tokens that all documents of a row see."""


@dataclass(frozen=True)
class Layout:
    """Positions and documents of a batch of sequences.

    Attributes:
        positions_BT: place of each token in its document, from 0; rotary angles follow from it.
        documents_BT: number of each token's document, `PADDING` for padding, or None where every
            row is one document. A token attends to earlier tokens of its own document, and to the
            shared ones.
        num_shared: tokens at the front of each row that all of its documents see.
        whole: of a part of the places of rows, the layout of all of them; else None. Only a core
            of attention that knows parts can take one.
    """

    positions_BT: Tensor
    documents_BT: Tensor | None = None
    num_shared: int = 0
    whole: Layout | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def whole_rows(cls, tokens_BT: Tensor) -> Layout:
        """Every row is one document."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        return cls(positions_T.expand(tokens_BT.shape))

    @classmethod
    def of_documents(cls, documents_BT: Tensor, places_T: Tensor | None = None) -> Layout:
        """Rows of consecutive documents; positions start anew with each of them.

        Where every row is one document there is none to tell apart, and attention needs no mask.
        Padding is none: what counts tokens has to see it.

        Args:
            documents_BT: number of each token's document, of whole rows.
            places_T: the places of the rows that the layout is of, which makes it a part of them;
                absent: all.
        """
        if places_T is not None:
            return cls.of_documents(documents_BT)._part(places_T, documents_BT)
        is_one_BT = (documents_BT == documents_BT[:, :1]) & (documents_BT != PADDING)
        if bool(is_one_BT.all()):
            return cls.whole_rows(documents_BT)
        index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand(
            documents_BT.shape
        )
        starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
        starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
        start_BT = torch.where(starts_BT, index_BT, 0).cummax(dim=1).values
        return cls(index_BT - start_BT, documents_BT)

    def _part(self, places_T: Tensor, documents_BS: Tensor) -> Layout:
        """Some places of this layout. Padding may be longer than the rows' context is, so all of it
        stands at position 0, which nobody sees.
        """
        documents_BT = documents_BS[:, places_T]
        positions_BT = self.positions_BT[:, places_T].masked_fill(documents_BT == PADDING, 0)
        return Layout(positions_BT, documents_BT, whole=self)

    def behind(self, num_shared: int) -> Layout:
        """The layout after shared tokens, which are put before every row."""
        front_P = torch.arange(num_shared, device=self.positions_BT.device)
        front_BP = front_P.expand(self.positions_BT.shape[0], num_shared)
        positions_BT = torch.cat([front_BP, self.positions_BT + num_shared], dim=1)
        if self.documents_BT is None:
            return Layout(positions_BT, None, num_shared)
        front_BP = self.documents_BT.new_full((len(self.documents_BT), num_shared), SHARED)
        documents_BT = torch.cat([front_BP, self.documents_BT], dim=1)
        return Layout(positions_BT, documents_BT, num_shared)

    def mask_B1TT(self, window: int | None = None) -> Tensor | None:
        """True where a query may see a key, or None where the plain causal mask will do.

        Made once for each window; all layers of a pass share it.

        Raises:
            RuntimeError: the layout is a part of its rows, whose queries see keys elsewhere.
        """
        if self.whole is not None:
            raise RuntimeError("a part of rows needs a core of attention that knows parts")
        return self.once(window, lambda: self._mask_B1TT(window))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What cores of attention make of a layout: made once for each key, all layers share it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _mask_B1TT(self, window: int | None) -> Tensor | None:
        length = self.positions_BT.shape[1]
        is_wide = window is None or window >= length
        if self.documents_BT is None and is_wide:
            return None
        device = self.positions_BT.device
        before_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        seen_TT = before_TT if window is None or is_wide else before_TT.triu(1 - window)
        if self.documents_BT is None:
            return seen_TT[None, None]
        same_BTT = self.documents_BT[:, :, None] == self.documents_BT[:, None, :]
        if self.num_shared == 0:
            return (same_BTT & seen_TT)[:, None]
        return (self._shared_BTT(same_BTT, window) & before_TT)[:, None]

    def _shared_BTT(self, same_BTT: Tensor, window: int | None) -> Tensor:
        """Pairs of one document, or of a query and a shared key, as near as a window demands.

        Shared tokens are as far from a token as their positions say, whatever lies between.
        """
        same_BTT[:, :, : self.num_shared] = True
        if window is None:
            return same_BTT
        apart_BTT = self.positions_BT[:, :, None] - self.positions_BT[:, None, :]
        return same_BTT & (apart_BTT < window)
