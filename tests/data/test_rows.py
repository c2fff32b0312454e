"""Rows against a plain reading of the token stream: every label once, none across documents."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core.errors import UsageError
from paceline.data.batch import IGNORED
from paceline.data.rows import DocumentRows, PackedRows, Row, Rows, rows_of
from paceline.data.store import TokenStore
from paceline.data.tokens import Source
from paceline.plan.plan import TrainConfig

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


def examples_of(lengths: list[int]) -> TokenStore:
    """The same documents as chats, in which every second token is an answer."""
    store = store_of(lengths)
    starts = np.arange(1, sum(lengths), 2)
    return TokenStore(store.tokens, store.ends, np.stack([starts, starts + 1], axis=1))


def labels_of(rows: Rows) -> Counter[tuple[int, int]]:
    return Counter(
        (int(token), int(label))
        for i in range(len(rows))
        for token, label in zip(rows[i].tokens_T, rows[i].labels_T, strict=True)
        if label != IGNORED
    )


def documents_in(row: Row) -> list[list[int]]:
    """The tokens of each of a row's documents."""
    numbers = sorted(set(row.documents_T.tolist()) - {-1})
    assert numbers == list(range(len(numbers)))
    assert (np.diff(row.documents_T[row.documents_T >= 0]) >= 0).all()
    return [row.tokens_T[row.documents_T == number].tolist() for number in numbers]


def expected_labels(lengths: list[int], answers_only: bool) -> Counter[tuple[int, int]]:
    pairs = Counter(labels_by_place(lengths).items())
    return Counter(pair for pair in pairs if not answers_only or (pair[1] - 100) % 2 == 1)


short = st.lists(st.integers(2, 9), min_size=1, max_size=20)


@given(short)
def test_whole_documents_share_rows_in_order_and_are_never_cut(lengths):
    rows = DocumentRows(examples_of(lengths), 9, PAD, packed=True)
    found = [document for i in range(len(rows)) for document in documents_in(rows[i])]
    starts = np.cumsum([100, *lengths[:-1]]).tolist()
    assert found == [list(range(s, s + n)) for s, n in zip(starts, lengths, strict=True)]
    assert labels_of(rows) == expected_labels(lengths, answers_only=True)
    for i in range(len(rows) - 1):  # no row ends before it has to
        assert sum(map(len, documents_in(rows[i]))) + len(documents_in(rows[i + 1])[0]) > 9


@given(documents, st.integers(1, 9), st.booleans())
def test_parts_of_long_documents_share_rows_too(lengths, length, answers_only):
    store = examples_of(lengths) if answers_only else store_of(lengths)
    rows = DocumentRows(store, length, PAD, packed=True)
    assert labels_of(rows) == expected_labels(lengths, answers_only)
    assert all(
        (row.tokens_T[row.documents_T == -1] == PAD).all()
        for row in map(rows.__getitem__, range(len(rows)))
    )


@given(documents, st.integers(2, 9), st.booleans(), st.booleans(), st.booleans())
def test_what_is_dropped_is_the_long_documents_and_nothing_else(
    lengths, length, pack, is_text, answers_only
):
    answers_only &= not is_text
    store = store_of(lengths)
    if not is_text:
        whole = np.array([[0, sum(lengths)]])
        store = (
            examples_of(lengths) if answers_only else TokenStore(store.tokens, store.ends, whole)
        )
    config = TrainConfig(sequence_length=length, pack=pack, long_documents="drop")
    kept = [n for n in lengths if n <= length]
    num_rows = (sum(kept) - 1) // length if pack and is_text else sum(n > 1 for n in kept)
    source = Source("src", (store,))
    if num_rows <= 0:
        with pytest.raises(UsageError, match=f"in documents that are short enough, .* {length} "):
            rows_of(source, config, pad_token=PAD)
        return
    rows = rows_of(source, config, pad_token=PAD)
    starts = np.cumsum([100, *lengths[:-1]])
    spans = [range(s, s + n) for s, n in zip(starts, lengths, strict=True) if n <= length]
    if pack and is_text:
        stream = [token for span in spans for token in span]
        assert len(rows) == num_rows
        found = [int(token) for i in range(num_rows) for token in rows[i].tokens_T]
        assert found == stream[: num_rows * length]
        ends = {span[-1] for span in spans}
        expected = {(t, t + 1) for t in found if t not in ends}
    else:
        expected = {(t, t + 1) for span in spans for t in span[:-1]}
        expected = {pair for pair in expected if not answers_only or (pair[1] - 100) % 2 == 1}
    assert set(labels_of(rows)) == expected


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("long", ["auto", "refuse"])
def test_a_long_example_is_refused_with_its_place(long, pack):
    store = examples_of([3, 8, 9, 4])
    origins = np.array([[0, 1], [1, 7], [1, 9], [1, 10]])
    files = (("a.jsonl", "line"), ("b.parquet", "row"))
    store = TokenStore(store.tokens, store.ends, store.answers, origins, files)
    config = TrainConfig(sequence_length=7, pack=pack, long_documents=long)
    with pytest.raises(UsageError) as caught:
        rows_of(Source("src", (store,)), config, pad_token=PAD)
    expected = "b.parquet, row 7: 8 tokens, more than train.sequence_length = 7"
    assert caught.value.message == expected
    assert "train.sequence_length of at least 9" in caught.value.hint
    assert '"drop" or "split"' in caught.value.hint
    longest = TrainConfig(sequence_length=9, pack=pack, long_documents=long)
    rows_of(Source("src", (store,)), longest, pad_token=PAD)


def test_long_text_is_split_unless_it_is_to_be_refused():
    source = Source("src", (store_of([3, 8]),))
    assert len(rows_of(source, TrainConfig(sequence_length=4), pad_token=PAD)) == 2
    with pytest.raises(UsageError, match="document 1: 8 tokens"):
        rows_of(source, TrainConfig(sequence_length=4, long_documents="refuse"), pad_token=PAD)


def test_the_rows_of_a_source_are_those_of_its_texts_and_of_its_examples():
    source = Source("src", (store_of([9]), examples_of([4, 4])))
    rows = rows_of(source, TrainConfig(sequence_length=4), pad_token=PAD)
    assert [rows[i].tokens_T.tolist() for i in range(len(rows))] == [
        [100, 101, 102, 103],
        [104, 105, 106, 107],
        [100, 101, 102, 103],
        [104, 105, 106, 107],
    ]
    assert rows[2].labels_T.tolist() == [101, IGNORED, 103, IGNORED]


def test_packed_examples_by_hand():
    rows = DocumentRows(examples_of([3, 2, 4]), 6, PAD, packed=True)
    assert [[column.tolist() for column in rows[i]] for i in range(len(rows))] == [
        [
            [100, 101, 102, 103, 104, PAD],
            [101, IGNORED, IGNORED, IGNORED, IGNORED, IGNORED],
            [0, 0, 0, 1, 1, -1],
        ],
        [
            [105, 106, 107, 108, PAD, PAD],
            [IGNORED, 107, IGNORED, IGNORED, IGNORED, IGNORED],
            [0, 0, 0, 0, -1, -1],
        ],
    ]
