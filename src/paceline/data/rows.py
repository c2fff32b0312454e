"""How documents become rows of one length.

A row's labels are its tokens moved by one, where they have a loss. No label crosses from one
document to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from paceline.core.errors import UsageError
from paceline.data.batch import IGNORED, Batch
from paceline.data.store import TokenStore
from paceline.data.tokens import Source
from paceline.plan.plan import TrainConfig

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


def as_batch(rows: Sequence[Row]) -> Batch:
    """Rows as the sequences of a micro-batch."""
    return Batch(*(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True)))


def padding_row(length: int, pad_token: int) -> Row:
    """A row that holds nothing: no loss, and no document."""
    return Row(
        np.full(length, pad_token, dtype=np.int64),
        np.full(length, IGNORED, dtype=np.int64),
        np.full(length, _PADDING, dtype=np.int64),
    )


def rows_of(source: Source, config: TrainConfig, *, pad_token: int) -> Rows:
    """The rows of a source: those of its texts, then those of its chats and completions.

    Args:
        source: tokenised.
        config: its length, packing, and what becomes of long documents.
        pad_token: fills what is left of rows.

    Raises:
        UsageError: a document that is too long, or not one row.
    """
    parts = [_rows_of_store(store, config, pad_token) for store in source.stores]
    rows = parts[0] if len(parts) == 1 else JoinedRows(parts)
    if len(rows) == 0:
        num_tokens = sum(len(store.tokens) for store in source.stores)
        which = "in documents that are short enough, " if config.long_documents == "drop" else ""
        raise UsageError(
            f"{source.name} has {num_tokens} tokens, {which}fewer than one sequence of "
            f"{config.sequence_length} + 1",
            hint="give more data, or a shorter train.sequence_length",
        )
    return rows


def _rows_of_store(store: TokenStore, config: TrainConfig, pad_token: int) -> Rows:
    is_text = store.answers is None
    length, long = config.sequence_length, config.long_documents
    if long == "auto":
        long = "split" if is_text else "refuse"
    if long == "refuse":
        _refuse_long(store, length)
    if is_text and config.pack:
        is_short = store.ends - store.starts <= length
        return PackedRows(store.keep(is_short) if long == "drop" else store, length)
    return DocumentRows(store, length, pad_token, packed=config.pack, drop_long=long == "drop")


def _refuse_long(store: TokenStore, length: int) -> None:
    lengths = store.ends - store.starts
    document = int(np.argmax(lengths > length))
    if lengths[document] > length:
        raise UsageError(
            f"{store.origin(document)}: {lengths[document]} tokens, more than "
            f"train.sequence_length = {length}",
            hint=f"train.sequence_length of at least {lengths.max()}, or train.long_documents = "
            '"drop" or "split"',
        )


class PackedRows:
    """Rows cut from the documents laid end to end; what is left at the end is dropped.

    Args:
        store: the tokens of texts, all of which have a loss.
        length: tokens of a row.
    """

    def __init__(self, store: TokenStore, length: int) -> None:
        self._store = store
        self._length = length

    def __len__(self) -> int:
        return max(0, len(self._store.tokens) - 1) // self._length

    def __getitem__(self, index: int) -> Row:
        start = index * self._length
        end = start + self._length + 1
        window = self._store.tokens[start:end].astype(np.int64)
        documents = np.searchsorted(self._store.ends, np.arange(start, end), side="right")
        documents -= documents[0]
        labels = np.where(documents[1:] == documents[:-1], window[1:], IGNORED)
        return Row(window[:-1], labels, documents[:-1])


class DocumentRows:
    """Rows of whole documents, or of parts of one longer than a row, padded at the end.

    Args:
        store: the tokens.
        length: tokens of a row; longer documents are cut into parts of this length.
        pad_token: fills what is left; it has no loss and no other token sees it.
        packed: whether documents share rows, as many in order as fit whole.
        drop_long: whether documents longer than a row are left out instead of cut.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        pad_token: int,
        *,
        packed: bool = False,
        drop_long: bool = False,
    ) -> None:
        self._store = store
        self._length = length
        self._pad_token = pad_token
        lengths = store.ends - store.starts
        # A document of n tokens has n - 1 labels: one token alone, that of its end, has no row.
        num_parts = -(-(lengths - 1) // length)
        if drop_long:
            num_parts[lengths > length] = 0
        self._last_part = np.cumsum(num_parts)
        self._first_part = (
            _pack(_part_sizes(lengths, num_parts, length), length)
            if packed
            else np.arange(num_parts.sum() + 1)
        )

    def __len__(self) -> int:
        return len(self._first_part) - 1

    def __getitem__(self, index: int) -> Row:
        row = padding_row(self._length, self._pad_token)
        first, last = self._first_part[index : index + 2].tolist()
        place = 0
        for number, part in enumerate(range(first, last)):
            start, end = self._span(part)
            window, has_loss = self._store.labels(start, end)
            size = min(len(window), self._length)
            row.tokens_T[place : place + size] = window[:size]
            row.documents_T[place : place + size] = number
            labels = np.where(has_loss, window, IGNORED)[1:]
            row.labels_T[place : place + len(labels)] = labels
            place += size
        return row

    def _span(self, part: int) -> tuple[int, int]:
        """The tokens of a part, and the label of its last one if that has one."""
        document = int(np.searchsorted(self._last_part, part, side="right"))
        start, before = 0, 0
        if document:
            start, before = int(self._store.ends[document - 1]), int(self._last_part[document - 1])
        start += (part - before) * self._length
        return start, min(start + self._length + 1, int(self._store.ends[document]))


def _part_sizes(
    lengths: NDArray[np.int64], num_parts: NDArray[np.int64], length: int
) -> NDArray[np.int64]:
    """Tokens of every part of every document: `length`, but for each document's last."""
    sizes = np.full(int(num_parts.sum()), length)
    has_parts = num_parts > 0
    last = lengths - (num_parts - 1) * length
    sizes[(np.cumsum(num_parts) - 1)[has_parts]] = np.minimum(last, length)[has_parts]
    return sizes


def _pack(sizes: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The first part of each row, and the number of parts: each row takes what fits, in order."""
    ends = np.cumsum(sizes)
    firsts = [0]
    while firsts[-1] < len(sizes):
        used = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
        firsts.append(int(np.searchsorted(ends, used + length, side="right")))
    return np.array(firsts)


class JoinedRows:
    """The rows of several lists, one list after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Row:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][index - (int(self._ends[part - 1]) if part else 0)]
