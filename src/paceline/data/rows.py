"""How documents become rows of one length: packed, or one document a row.

A row's labels are its tokens moved by one. No label crosses from one document to the next.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.data.batch import IGNORED
from paceline.data.tokens import TokenStore

_PADDING = -1


class Row(NamedTuple):
    """One sequence; each array has its length."""

    tokens_T: NDArray[np.int64]
    labels_T: NDArray[np.int64]
    documents_T: NDArray[np.int64]


class Rows(Protocol):
    """A fixed list of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class PackedRows:
    """Rows cut from the documents laid end to end; what is left at the end is dropped.

    Args:
        store: the tokens.
        length: tokens of a row.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        self._store = store
        self._length = length

    def __len__(self) -> int:
        return max(0, len(self._store.tokens) - 1) // self._length

    def __getitem__(self, index: int) -> Row:
        start = index * self._length
        window = self._store.tokens[start : start + self._length + 1].astype(np.int64)
        places = np.arange(start, start + self._length + 1)
        documents = np.searchsorted(self._store.ends, places, side="right")
        documents -= documents[0]
        labels = np.where(documents[1:] == documents[:-1], window[1:], IGNORED)
        return Row(window[:-1], labels, documents[:-1])


class DocumentRows:
    """Rows that each hold one document or a part of one, padded at the end.

    Args:
        store: the tokens.
        length: tokens of a row; longer documents take several.
        pad_token: fills what is left; it has no loss and no other token sees it.
    """

    def __init__(self, store: TokenStore, length: int, pad_token: int) -> None:
        self._store = store
        self._length = length
        self._pad_token = pad_token
        starts = np.concatenate([[0], store.ends[:-1]])
        # A document of n tokens has n - 1 labels: one token alone, that of its end, has no row.
        rows_of = -(-(store.ends - starts - 1) // length)
        self._starts = starts
        self._last_row = np.cumsum(rows_of)

    def __len__(self) -> int:
        return int(self._last_row[-1])

    def __getitem__(self, index: int) -> Row:
        document = int(np.searchsorted(self._last_row, index, side="right"))
        part = index - (int(self._last_row[document - 1]) if document else 0)
        start = int(self._starts[document]) + part * self._length
        end = min(start + self._length + 1, int(self._store.ends[document]))
        window = self._store.tokens[start:end].astype(np.int64)
        tokens = np.full(self._length, self._pad_token, dtype=np.int64)
        labels = np.full(self._length, IGNORED, dtype=np.int64)
        documents = np.full(self._length, _PADDING, dtype=np.int64)
        num_tokens = min(len(window), self._length)
        tokens[:num_tokens] = window[:num_tokens]
        documents[:num_tokens] = 0
        labels[: len(window) - 1] = window[1:]
        return Row(tokens, labels, documents)
