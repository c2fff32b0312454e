"""Token stores: what is in them, that they are made once, and that nothing half-made stays."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from paceline.core.errors import DataError
from paceline.data import store as stores
from paceline.data.store import TokenStore
from paceline.data.tokens import Encoding, Source, tokenize
from paceline.models.tokenizer import byte_tokenizer

pytestmark = pytest.mark.cpu

END = 256


class CountingEncoder:
    """Bytes as tokens, at most `limit` texts of them."""

    eos_ids = (END,)
    start_ids = ()

    def __init__(self, limit: int = 10**9) -> None:
        self.num_texts = 0
        self.limit = limit

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.num_texts += len(texts)
        if self.num_texts > self.limit:
            raise KeyboardInterrupt
        return [list(text.encode()) for text in texts]

    def encode_with_starts(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """Of ASCII alone, in which a byte is a character."""
        return [(ids, list(range(len(ids)))) for ids in self.encode_batch(texts)]


def render(messages, *, add_generation_prompt: bool) -> str:
    """``<content>`` for each message, the role told by the bracket."""
    brackets = {"user": "[]", "assistant": "<>"}
    said = [f"{brackets[m['role']][0]}{m['content']}{brackets[m['role']][1]}" for m in messages]
    return "".join(said) + ("<" if add_generation_prompt else "")


def source_of(path, cache, encoder=None, *, identity="bytes", end_token=END, **options) -> Source:
    encoding = Encoding(encoder or CountingEncoder(), render, identity, end_token, **options)
    return tokenize(str(path), encoding, cache=cache)


def tokens_of(path, cache, encoder=None, **options) -> TokenStore:
    (store,) = source_of(path, cache, encoder, **options).stores
    return store


def everything(store: TokenStore) -> list[int]:
    return store.tokens[0 : len(store.tokens)].tolist()


def is_empty(cache: Path) -> bool:
    return not cache.exists() or list(cache.iterdir()) == []


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "ab"}\n{"text": ""}\n{"text": "cde"}\n')
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_documents_are_laid_end_to_end_each_with_its_end(source, cache):
    store = tokens_of(source, cache)
    assert everything(store) == [*b"ab", END, END, *b"cde", END]
    assert store.ends.tolist() == [3, 4, 8]
    assert store.starts.tolist() == [0, 3, 4]
    assert store.tokens[0:1].dtype == np.uint32
    assert store.labels(1, 4)[1].all()
    assert [store.origin(n) for n in range(3)] == [f"{source}, line {n}" for n in (1, 2, 3)]


def test_a_real_tokenizer_gives_the_text_back(source, cache):
    tokenizer = byte_tokenizer()
    store = tokens_of(source, cache, tokenizer, end_token=tokenizer.eos_ids[0])
    spans = zip(store.starts, store.ends, strict=True)
    ids = [store.tokens[a : b - 1].tolist() for a, b in spans]
    assert [tokenizer.decode(document) for document in ids] == ["ab", "", "cde"]
    assert {everything(store)[end - 1] for end in store.ends} == {tokenizer.eos_ids[0]}


def test_examples_are_stored_with_their_answers_and_apart_from_text(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    chat = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "two")]
    messages = [{"role": role, "content": content} for role, content in chat]
    records = [
        {"prompt": "2+2=", "completion": "4"},
        {"text": "plain"},
        {"messages": messages},
        {"prompt": messages[:3], "completion": "2"},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    encoder = CountingEncoder()
    encoder.start_ids = (300,)  # as a model's that begins texts so; templates spell their own
    texts, examples = source_of(path, cache, encoder).stores
    assert everything(texts) == [300, *b"plain", END]
    assert texts.origin(0) == f"{path}, line 2"
    whole = [300, *b"2+2=4", END, *b"[q]<one>[r]<two>", *b"[q]<one>[r]<2>"]
    assert everything(examples) == whole
    tokens, has_loss = examples.labels(0, len(whole))
    answered = [[*b"4", END], [*b"one>"], [*b"two>"], [*b"2>"]]
    assert tokens[has_loss].tolist() == [token for answer in answered for token in answer]
    assert [examples.origin(n) for n in range(3)] == [f"{path}, line {n}" for n in (1, 3, 4)]
    for start in range(len(whole)):  # any window tells the same
        assert examples.labels(start, len(whole))[1].tolist() == has_loss[start:].tolist()

    _, examples = source_of(path, cache, encoder, answers_only=False).stores
    assert everything(examples)[-15:] == whole[-15:]
    assert examples.labels(1, len(whole))[1].all()


def test_what_starts_a_completion_is_no_part_of_the_answer(tmp_path, cache):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "", "completion": "x"}\n')
    encoder = CountingEncoder()
    encoder.start_ids = (300,)
    tokens, has_loss = tokens_of(path, cache, encoder).labels(0, 3)
    assert tokens.tolist() == [300, ord("x"), END]
    assert has_loss.tolist() == [False, True, True]


def test_text_is_tokenised_once(source, cache):
    encoder = CountingEncoder()
    first = source_of(source, cache, encoder)
    second = source_of(source, cache, encoder)
    assert encoder.num_texts == 3
    assert everything(first.stores[0]) == everything(second.stores[0])
    assert first.identity == second.identity
    assert isinstance(second.stores[0].tokens, np.memmap)  # larger than memory, perhaps


def test_the_cache_is_keyed_by_source_tokenizer_and_end(source, cache):
    encoder = CountingEncoder()
    tokens_of(source, cache, encoder)
    tokens_of(source, cache, encoder, identity="other bytes")
    assert everything(tokens_of(source, cache, encoder, end_token=999))[2] == 999
    tokens_of(source, cache, encoder, answers_only=False)
    source.write_text('{"text": "new"}\n')
    assert everything(tokens_of(source, cache, encoder)) == [*b"new", END]
    assert encoder.num_texts == 4 * 3 + 1
    assert len(list(cache.iterdir())) == 5


def test_the_identity_is_of_the_tokens_and_of_no_path(source, cache, tmp_path):
    identity = source_of(source, cache).identity
    copy = tmp_path / "elsewhere" / "copy.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(source.read_bytes())
    assert source_of(copy, cache).identity == identity
    assert source_of(copy.parent, cache).identity == identity
    found = {identity}
    # Each differs in one thing: a token, a border, an answer.
    for content in (
        '{"text": "ab"}\n{"text": ""}\n{"text": "cdf"}\n',
        '{"text": "ab"}\n{"text": "cde"}\n{"text": ""}\n',
        '{"prompt": "ab", "completion": "cd"}\n',
        '{"prompt": "abc", "completion": "d"}\n',
    ):
        copy.write_text(content)
        found.add(source_of(copy, cache).identity)
    assert len(found) == 5


def test_the_identity_knows_where_documents_end(tmp_path, cache):
    """The same tokens: once an end that the text spells, once the end of a document."""
    tokenizer = byte_tokenizer()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text('{"text": "a<|endoftext|>b"}\n')
    two.write_text('{"text": "a"}\n{"text": "b"}\n')
    sources = [source_of(path, cache, tokenizer) for path in (one, two)]
    assert everything(sources[0].stores[0]) == everything(sources[1].stores[0])
    assert sources[0].identity != sources[1].identity


def test_text_larger_than_a_batch_is_all_there(tmp_path, cache):
    text = "0123456789" * 100_000  # a million characters, of which a batch takes five
    path = tmp_path / "large.jsonl"
    path.write_text(f'{{"text": "{text}"}}\n' * 7)
    store = tokens_of(path, cache)
    assert store.ends.tolist() == [(i + 1) * (len(text) + 1) for i in range(7)]
    assert np.bincount(store.tokens[:], minlength=END + 1)[[ord("7"), END]].tolist() == [700_000, 7]


def test_a_text_file_in_pieces_has_the_tokens_of_the_whole(tmp_path, cache):
    tokenizer = byte_tokenizer()
    content = "a line of text\n" * 50_000  # three pieces
    (tmp_path / "large.txt").write_text(content)
    store = tokens_of(tmp_path / "large.txt", cache, tokenizer)
    assert everything(store) == [*tokenizer.encode(content), END]
    assert store.ends.tolist() == [len(content) + 1]
    assert store.origin(0) == str(tmp_path / "large.txt")


@pytest.mark.parametrize("shard_tokens", [1, 3, 8, 9])
def test_shards_are_bounded_and_read_as_one(source, cache, monkeypatch, shard_tokens):
    monkeypatch.setattr(stores, "SHARD_TOKENS", shard_tokens)
    store = tokens_of(source, cache)
    sizes = [file.stat().st_size // 4 for file in sorted(cache.rglob("tokens-*"))]
    assert sizes == [min(shard_tokens, 8 - start) for start in range(0, 8, shard_tokens)]
    whole = [*b"ab", END, END, *b"cde", END]
    assert len(store.tokens) == 8
    for start in range(9):
        for end in range(start, 12):
            assert store.tokens[start:end].tolist() == whole[start:end]


def test_several_who_want_a_store_at_a_time_make_it_once(source, cache):
    encoder = CountingEncoder()
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(everything(tokens_of(source, cache, encoder))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 8
    assert encoder.num_texts == 3
    assert len(list(cache.iterdir())) == 1


def test_an_interrupt_leaves_nothing_behind(source, cache):
    with pytest.raises(KeyboardInterrupt):
        tokens_of(source, cache, CountingEncoder(limit=2))
    assert is_empty(cache)
    assert len(tokens_of(source, cache).ends) == 3


def test_a_break_in_writing_leaves_nothing_behind(source, cache, monkeypatch):
    def fail(*_args, **_options):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stores.StoreWriter, "end", fail)  # after the tokens, before their ends
        with pytest.raises(OSError, match="no space"):
            tokens_of(source, cache)
    assert is_empty(cache)
    assert tokens_of(source, cache).ends.tolist() == [3, 4, 8]


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n{"text": ""}\n'])
def test_a_source_without_text_is_refused(tmp_path, cache, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty\.jsonl holds no text"):
        tokens_of(path, cache)
    assert is_empty(cache)


def test_an_empty_text_file_is_refused(tmp_path, cache):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt holds no text"):
        tokens_of(tmp_path / "empty.txt", cache)


def test_a_broken_line_leaves_nothing_behind(source, cache):
    source.write_text(source.read_text() * 9000 + "{")
    with pytest.raises(DataError, match="line 27001: not JSON"):
        tokens_of(source, cache)
    assert is_empty(cache)
