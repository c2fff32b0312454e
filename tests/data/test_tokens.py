from __future__ import annotations

import numpy as np
import pytest

from paceline.core.errors import DataError
from paceline.data.tokens import TokenStore, tokenize
from paceline.models.tokenizer import byte_tokenizer

pytestmark = pytest.mark.cpu

END = 256


class CountingEncoder:
    """Bytes as tokens, at most `limit` texts of them."""

    def __init__(self, limit: int = 10**9) -> None:
        self.num_texts = 0
        self.limit = limit

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.num_texts += len(texts)
        if self.num_texts > self.limit:
            raise KeyboardInterrupt
        return [list(text.encode()) for text in texts]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "ab"}\n{"text": ""}\n{"text": "cde"}\n')
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def tokens_of(source, cache, encoder=None, *, identity="bytes", end_token=END) -> TokenStore:
    encoder = encoder or CountingEncoder()
    return tokenize(str(source), encoder, identity=identity, end_token=end_token, cache=cache)


def test_documents_are_laid_end_to_end_each_with_its_end(source, cache):
    store = tokens_of(source, cache)
    assert store.tokens.tolist() == [*b"ab", END, END, *b"cde", END]
    assert store.ends.tolist() == [3, 4, 8]
    assert store.tokens.dtype == np.uint32


def test_a_real_tokenizer_gives_the_text_back(source, cache):
    tokenizer = byte_tokenizer()
    store = tokens_of(source, cache, tokenizer, end_token=tokenizer.eos_ids[0])
    starts = [0, *store.ends[:-1]]
    ids = [store.tokens[a : b - 1].tolist() for a, b in zip(starts, store.ends, strict=True)]
    assert [tokenizer.decode(document) for document in ids] == ["ab", "", "cde"]
    assert set(store.tokens[store.ends - 1].tolist()) == {tokenizer.eos_ids[0]}


def test_text_is_tokenised_once(source, cache):
    encoder = CountingEncoder()
    first = tokens_of(source, cache, encoder)
    second = tokens_of(source, cache, encoder)
    assert encoder.num_texts == 3
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.ends, second.ends)
    assert isinstance(second.tokens, np.memmap)  # larger than memory, perhaps


def test_the_cache_is_keyed_by_source_tokenizer_and_end(source, cache):
    encoder = CountingEncoder()
    tokens_of(source, cache, encoder)
    tokens_of(source, cache, encoder, identity="other bytes")
    assert tokens_of(source, cache, encoder, end_token=999).tokens[2] == 999
    source.write_text('{"text": "new"}\n')
    assert tokens_of(source, cache, encoder).tokens.tolist() == [*b"new", END]
    assert encoder.num_texts == 3 + 3 + 3 + 1
    assert len(list(cache.iterdir())) == 4


def test_text_larger_than_a_batch_is_all_there(tmp_path, cache):
    text = "0123456789" * 100_000  # a million characters, of which a batch takes three
    path = tmp_path / "large.jsonl"
    path.write_text(f'{{"text": "{text}"}}\n' * 7)
    store = tokens_of(path, cache)
    assert store.ends.tolist() == [(i + 1) * (len(text) + 1) for i in range(7)]
    assert np.bincount(store.tokens, minlength=END + 1)[[ord("7"), END]].tolist() == [700_000, 7]


def test_an_interrupt_leaves_nothing_behind(source, cache):
    with pytest.raises(KeyboardInterrupt):
        tokens_of(source, cache, CountingEncoder(limit=2))
    assert not cache.exists() or list(cache.iterdir()) == []
    assert len(tokens_of(source, cache).ends) == 3


def test_a_break_in_writing_leaves_nothing_behind(source, cache, monkeypatch):
    def fail(*_args, **_options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "cumsum", fail)  # after the tokens, before their ends
        with pytest.raises(OSError, match="no space"):
            tokens_of(source, cache)
    assert list(cache.iterdir()) == []
    assert tokens_of(source, cache).ends.tolist() == [3, 4, 8]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": ""}\n'])
def test_a_source_without_text_is_refused(tmp_path, cache, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl holds no text"):
        tokens_of(path, cache)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_an_empty_text_file_is_refused(tmp_path, cache):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        tokens_of(tmp_path / "empty.txt", cache)
