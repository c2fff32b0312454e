"""Rows against a plain reading of the token stream: every label once, none across documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.batch import IGNORED
from paceline.data.rows import DocumentRows, PackedRows
from paceline.data.store import TokenStore

pytestmark = pytest.mark.cpu

PAD = 7


def store_of(lengths: list[int]) -> TokenStore:
    """Documents of these lengths; each token is its own place in the stream, plus 100."""
    tokens = np.arange(100, 100 + sum(lengths), dtype=np.uint32)
    return TokenStore(tokens, np.cumsum(lengths, dtype=np.int64))


def labels_by_place(lengths: list[int]) -> dict[int, int]:
    """Each token that has a successor in its document, and that successor."""
    pairs, start = {}, 100
    for length in lengths:
        pairs |= {token: token + 1 for token in range(start, start + length - 1)}
        start += length
    return pairs


documents = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(documents, st.integers(1, 9))
def test_packed_rows_tile_the_stream(lengths, length):
    store = store_of(lengths)
    rows = PackedRows(store, length)
    tokens = [int(token) for i in range(len(rows)) for token in rows[i].tokens_T]
    assert tokens == store.tokens[: len(tokens)].tolist()
    # What is left is too short for one more row and the label of its last token.
    assert 0 < len(store.tokens) - len(tokens) <= length


@given(documents, st.integers(1, 9))
def test_packed_labels_never_cross_documents(lengths, length):
    rows, expected = PackedRows(store_of(lengths), length), labels_by_place(lengths)
    for i in range(len(rows)):
        row = rows[i]
        found = dict(zip(row.tokens_T.tolist(), row.labels_T.tolist(), strict=True))
        assert found == {token: expected.get(token, IGNORED) for token in found}


@given(documents, st.integers(1, 9))
def test_packed_rows_number_their_documents_from_0(lengths, length):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = PackedRows(store_of(lengths), length)
    for i in range(len(rows)):
        owners = owner[i * length : (i + 1) * length]
        assert rows[i].documents_T.tolist() == (owners - owners[0]).tolist()


@given(documents, st.integers(1, 9))
def test_document_rows_hold_every_label_once(lengths, length):
    rows = DocumentRows(store_of(lengths), length, PAD)
    found = Counter(
        (int(token), int(label))
        for i in range(len(rows))
        for token, label in zip(rows[i].tokens_T, rows[i].labels_T, strict=True)
        if label != IGNORED
    )
    assert found == Counter(labels_by_place(lengths).items())


@given(documents, st.integers(1, 9))
def test_document_rows_hold_one_document_and_padding(lengths, length):
    owner = np.repeat(np.arange(len(lengths)), lengths)
    rows = DocumentRows(store_of(lengths), length, PAD)
    for i in range(len(rows)):
        row = rows[i]
        is_text_T = row.documents_T == 0
        assert row.tokens_T.shape == row.labels_T.shape == row.documents_T.shape == (length,)
        assert is_text_T.any()
        assert not (is_text_T[1:] & ~is_text_T[:-1]).any()  # padding is at the end
        assert set(row.documents_T[~is_text_T].tolist()) <= {-1}
        assert set(row.tokens_T[~is_text_T].tolist()) <= {PAD}
        assert set(row.labels_T[~is_text_T].tolist()) <= {IGNORED}
        text = row.tokens_T[is_text_T]
        assert text.tolist() == list(range(text[0], text[0] + len(text)))
        assert len(set(owner[text - 100].tolist())) == 1


@given(documents, st.integers(1, 9))
def test_every_document_row_has_a_label(lengths, length):
    """Empty documents are one token, their end: a step of such rows would have no loss at all."""
    rows = DocumentRows(store_of(lengths), length, PAD)
    assert all((rows[i].labels_T != IGNORED).any() for i in range(len(rows)))
    assert len(rows) == sum(-(-(n - 1) // length) for n in lengths)


def test_rows_by_hand():
    store = store_of([3, 1, 4])
    packed = PackedRows(store, 4)
    assert len(packed) == 1
    assert [column.tolist() for column in packed[0]] == [
        [100, 101, 102, 103],
        [101, 102, IGNORED, IGNORED],
        [0, 0, 0, 1],
    ]
    single = DocumentRows(store, 2, PAD)
    assert [[column.tolist() for column in single[i]] for i in range(len(single))] == [
        [[100, 101], [101, 102], [0, 0]],
        [[104, 105], [105, 106], [0, 0]],
        [[106, 107], [107, IGNORED], [0, 0]],
    ]
    (short,) = [DocumentRows(store_of([2]), 4, PAD)[0]]
    assert [column.tolist() for column in short] == [
        [100, 101, PAD, PAD],
        [101, IGNORED, IGNORED, IGNORED],
        [0, 0, -1, -1],
    ]


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_packed_row_needs_the_label_of_its_last_token(num_tokens, num_rows):
    assert len(PackedRows(store_of([num_tokens]), 4)) == num_rows
