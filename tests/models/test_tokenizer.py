"""Text to ids and back, whole and token by token."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, normalizers, pre_tokenizers

from paceline.core.errors import RequestError
from paceline.models.tokenizer import (
    IncrementalDecoder,
    Tokenizer,
    bpe_tokenizer,
    byte_tokenizer,
    read_tokenizer,
    tokenizer_files,
)

pytestmark = pytest.mark.cpu

BYTES = byte_tokenizer()
NUM_SPECIAL = 3
LLAMA = "🦙"
SYMBOLS = [
    token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(LLAMA)
]


def merging_tokenizer():
    """Tokens that hold the end of one character and the beginning of the next."""
    symbols = "".join(SYMBOLS)
    assert len(symbols) == 4
    merges = [(symbols[3], symbols[0]), (symbols[1], symbols[2]), ("a", symbols[0])]
    merges += [("h", "e"), (symbols[3], "Ġ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(left + right for left, right in merges)]
    return bpe_tokenizer(
        {token: index for index, token in enumerate(vocabulary)},
        merges=merges,
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        control_tokens=["<|endoftext|>"],
        eos_tokens=["<|endoftext|>"],
        chat_template=None,
    )


MERGING = merging_tokenizer()


def spaced_tokenizer():
    """As sentencepiece makes them: a text's first space is not shown, rare bytes are tokens."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helo", "he", "▁he", "ll"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[("h", "e"), ("▁", "he"), ("l", "l")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, eos_ids=[])


SPACED = spaced_tokenizer()


def pieces(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.finish()]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 255 + NUM_SPECIAL), max_size=40))
def test_pieces_of_any_bytes_join_to_the_whole(ids):
    assert "".join(pieces(BYTES, ids)) == BYTES.decode(ids)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_pieces_of_any_tokens_join_to_the_whole(data):
    ids = data.draw(st.lists(st.integers(0, MERGING.vocab_size - 1), max_size=40))
    assert "".join(pieces(MERGING, ids)) == MERGING.decode(ids)


@settings(deadline=None, max_examples=200)
@given(
    st.text(
        st.sampled_from(f"he a{LLAMA}é€\ufffd\n")
        # SentencePiece spells a space with it.
        | st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"),
        max_size=30,
    )
)
@pytest.mark.parametrize("tokenizer", [BYTES, MERGING, SPACED], ids=["bytes", "merging", "spaced"])
def test_text_goes_and_comes_back_and_characters_are_never_torn(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text
    if "\ufffd" not in text and tokenizer is not SPACED:
        assert not any("\ufffd" in part for part in parts)


def test_an_emoji_comes_with_its_last_byte():
    ids = BYTES.encode(f"a{LLAMA}b")
    assert pieces(BYTES, ids) == ["a", "", "", "", LLAMA, "b", ""]
    ids = MERGING.encode(f"{LLAMA}{LLAMA}b")
    assert len(ids) == 6  # the third holds the first's last byte and the second's first
    assert pieces(MERGING, ids) == ["", "", "", "", f"{LLAMA}{LLAMA}", "b", ""]


def test_spaces_between_words_are_shown_though_the_first_is_not():
    ids = SPACED.encode("hello hello")
    assert len(ids) == 6
    assert pieces(SPACED, ids) == ["he", "ll", "o", " he", "ll", "o", ""]


def test_what_is_held_back_comes_at_the_end():
    ids = BYTES.encode(LLAMA)[:3]
    parts = pieces(BYTES, ids)
    assert parts[:-1] == ["", "", ""]
    assert parts[-1] == BYTES.decode(ids) == "\ufffd"


def test_half_a_character_is_refused():
    """A shell's argument that is not UTF-8 arrives so."""
    with pytest.raises(RequestError, match="not valid Unicode") as caught:
        BYTES.encode("a\udcff")
    assert caught.value.param == "prompt"


def test_special_tokens_are_read_but_not_shown():
    ids = BYTES.encode("<|im_start|>hi<|im_end|>")
    assert len(ids) == 4
    assert ids[3] in BYTES.eos_ids
    assert BYTES.decode(ids) == "hi"


def test_ids_beyond_the_vocabulary_are_no_text():
    """An embedding may have more rows than the tokenizer has tokens."""
    assert pieces(BYTES, [BYTES.vocab_size + 5, *BYTES.encode("hi")])[-2:] == ["i", ""]


def test_a_batch_is_each_text_alone():
    texts = ["hello", "", LLAMA, "<|im_end|> x"]
    assert MERGING.encode_batch(texts) == [MERGING.encode(text) for text in texts]


def test_files_and_back(tmp_path):
    for name, text in tokenizer_files(MERGING).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    again = read_tokenizer(tmp_path)
    text = f"he {LLAMA} a{LLAMA}<|endoftext|>"
    assert again.encode(text) == MERGING.encode(text)
    assert again.vocab_size == MERGING.vocab_size
    assert again.eos_ids == MERGING.eos_ids
    assert again.chat_template is None
    assert again.special_tokens == MERGING.special_tokens


def folder_with(tmp_path, **files):
    for name, text in tokenizer_files(BYTES).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for name, value in files.items():
        path = tmp_path / f"{name}.json"
        path.unlink(missing_ok=True)
        if value is not None:
            path.write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, BYTES.eos_ids),
        ({"generation_config": {"eos_token_id": 7}}, (7,)),
        ({"generation_config": {"eos_token_id": [7, 9]}}, (7, 9)),
        ({"generation_config": {}}, (BYTES.eos_ids[0],)),
        ({"generation_config": None, "tokenizer_config": {"eos_token": {"content": "a"}}}, None),
        ({"generation_config": None, "tokenizer_config": {}, "config": {"eos_token_id": 5}}, (5,)),
        ({"generation_config": None, "tokenizer_config": {}}, ()),
    ],
)
def test_which_tokens_end_an_answer(tmp_path, files, expected):
    expected = (BYTES.backend.token_to_id("a"),) if expected is None else expected
    assert read_tokenizer(folder_with(tmp_path, **files)).eos_ids == expected
