"""Text to tokens and back over HTTP, models and versions, and what tokens are called."""

from __future__ import annotations

import httpx
import pytest
from asking import MESSAGES, NAME, error_of, live
from engines import SPEC, TOKENIZER, Scripted, scripted_engine
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import paceline
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.serve.api.token_texts import TokenTexts

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def http():
    with (
        live(scripted_engine(Scripted())) as address,
        httpx.Client(base_url=address) as client,
    ):
        yield client


def test_a_prompt_as_tokens(http):
    body = http.post("/tokenize", json={"model": NAME, "prompt": "hé"}).json()
    ids = TOKENIZER.encode("hé")
    assert body == {
        "count": 3,
        "max_model_len": SPEC.max_positions,
        "tokens": ids,
        "token_strs": None,
    }
    body = http.post("/tokenize", json={"prompt": "hé", "return_token_strs": True}).json()
    assert body["token_strs"] == ["h", "Ã", "©"]


def test_a_conversation_as_tokens(http):
    prompt = render_chat(TOKENIZER, MESSAGES)
    body = http.post("/tokenize", json={"messages": MESSAGES}).json()
    assert body["tokens"] == TOKENIZER.encode(prompt, add_special_tokens=False)
    fields = {"messages": MESSAGES, "add_generation_prompt": False}
    shorter = http.post("/tokenize", json=fields).json()["tokens"]
    assert TOKENIZER.backend.decode(shorter, skip_special_tokens=False) == prompt.removesuffix(
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("text", ["", "hé 🦙\n", "<|im_start|>x"])
def test_there_and_back(http, text):
    tokens = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "x", "chat_template": "{{ x }}"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages.0.content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [SPEC.vocab_size]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
    ],
    ids=str,
)
def test_what_is_refused(http, path, body, param):
    assert error_of(http.post(path, json=body))["param"] == param


def test_another_model(http):
    for path, what in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert error_of(http.post(path, json={"model": "other"} | what), 404)["param"] == "model"


def test_the_model_and_the_version(http):
    (card,) = http.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == (NAME, SPEC.max_positions)
    assert http.get(f"/v1/models/{NAME}").json() == card
    assert error_of(http.get("/v1/models/some/other"), 404)["param"] == "model"
    assert http.get("/version").json() == {"version": paceline.__version__}
    info = http.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>"
    assert info["chat_template"] == TOKENIZER.chat_template


# What tokens are called


@given(st.text(max_size=20))
def test_the_bytes_of_tokens_are_those_of_the_text(text):
    texts = TokenTexts(TOKENIZER)
    raw = b"".join(texts.bytes_of(token) for token in TOKENIZER.encode(text))
    assert raw == text.encode()


def test_tokens_have_names_of_their_own():
    texts = TokenTexts(TOKENIZER)
    names = [texts.text_of(token) for token in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names)
    assert texts.text_of(TOKENIZER.encode("é")[0]) == "bytes:\\xc3"
    assert texts.text_of(TOKENIZER.eos_ids[-1]) == "<|im_end|>"
    assert not texts.is_shown(TOKENIZER.eos_ids[-1])
    assert texts.is_shown(TOKENIZER.encode("a")[0])
    assert texts.bytes_of(TOKENIZER.vocab_size + 5) == b""


def test_a_vocabulary_of_words_with_bytes_to_fall_back_on():
    vocabulary = {"<unk>": 0, "\u2581hi": 1, "<0xC3>": 2, "<0xA9>": 3, "x": 4}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = TokenTexts(Tokenizer(backend, eos_ids=[]))
    assert [texts.bytes_of(n) for n in range(1, 5)] == [b" hi", b"\xc3", b"\xa9", b"x"]
    assert backend.decode([1, 2, 3, 4]) == " hiéx"
