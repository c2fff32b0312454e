"""What a body may ask of its choices: how many, of which prompts, with which log-probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import httpx
import pytest
import torch
from asking import CHAT, COMPLETIONS, MESSAGES, NAME, answer, chunks, error_of, live, post
from engines import TOKENIZER, Scripted, ask, encode, real_engine, scripted_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from test_app import wait_until

from paceline.decode.sampler import SamplingParams
from paceline.models.chat import render_chat

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def http():
    with live(real_engine()) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def request_of(prompt, *, stream=0, seed=4, max_tokens=8, **options):
    sampling = SamplingParams(seed=seed, stream=stream)
    return replace(ask(prompt, max_tokens=max_tokens, **options), sampling=sampling)


def texts(body):
    return [choice["text"] for choice in body["choices"]]


def joined(events):
    """Each choice's text in a stream of completions."""
    found = {}
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] = found.get(choice["index"], "") + choice["text"]
    return [found[index] for index in sorted(found)]


# Many choices


def test_choices_differ_by_their_stream_of_noise_alone(http):
    expected = real_engine().generate([request_of("hi", stream=n) for n in range(5)])
    body = answer(http, COMPLETIONS, n=5, seed=4)
    assert texts(body) == [one.text for one in expected]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3, 4]
    assert len(set(texts(body))) == 5
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["completion_tokens"] == sum(len(one.token_ids) for one in expected)
    assert joined(chunks(http, COMPLETIONS, n=5, seed=4)) == texts(body)


def test_choices_of_a_chat(http):
    body = answer(http, CHAT, n=3, seed=4)
    contents = [choice["message"]["content"] for choice in body["choices"]]
    assert contents[0] == answer(http, CHAT, seed=4)["choices"][0]["message"]["content"]
    streamed, roles = ["", "", ""], []
    for event in chunks(http, CHAT, n=3, seed=4):
        for choice in event["choices"]:
            roles += [choice["index"]] if "role" in choice["delta"] else []
            streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == contents
    assert sorted(roles) == [0, 1, 2]


def test_what_was_found_is_told():
    prompt = "x" * 100
    with live(real_engine()) as address, httpx.Client(base_url=address, timeout=30) as http:
        first = answer(http, COMPLETIONS, prompt=prompt, n=4)
        again = answer(http, COMPLETIONS, prompt=prompt)
        last = chunks(http, COMPLETIONS, prompt=prompt, stream_options={"include_usage": True})[-1]
    assert first["usage"]["prompt_tokens"] == 100
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}  # whole blocks of 16
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 96}


def test_a_client_that_leaves_ends_all_its_choices():
    executor = Scripted(step_s=0.005)
    with live(scripted_engine(executor)) as address, httpx.Client(base_url=address) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post(
                COMPLETIONS,
                json={"model": NAME, "prompt": ["a", "b"], "n": 2, "max_tokens": 90_000},
                timeout=0.2,
            )
        wait_until(lambda: sorted(executor.released) == [0, 1, 2, 3])


# Prompts


@pytest.mark.parametrize(
    ("prompt", "as_texts"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        (["hi", "ho", "hi"], ["hi", "ho", "hi"]),
        (list(encode("hi")), ["hi"]),
        ([list(encode("hi")), list(encode("ho"))], ["hi", "ho"]),
    ],
    ids=str,
)
def test_prompts_are_texts_or_tokens_or_lists_of_them(http, prompt, as_texts):
    requests = [request_of(text, stream=n) for text in as_texts for n in range(2)]
    expected = [one.text for one in real_engine().generate(requests)]
    body = answer(http, COMPLETIONS, prompt=prompt, n=2, seed=4)
    assert texts(body) == expected
    assert body["usage"]["prompt_tokens"] == 2 * len(as_texts)
    assert joined(chunks(http, COMPLETIONS, prompt=prompt, n=2, seed=4)) == expected


def test_choices_are_bounded_together(http):
    error = error_of(post(http, COMPLETIONS, prompt=["x"] * 64, n=3))
    assert error["param"] == "n"
    assert "128" in error["message"]


def test_one_bad_prompt_of_many_begins_none():
    engine = real_engine()
    with live(engine) as address, httpx.Client(base_url=address) as http:
        error = error_of(post(http, COMPLETIONS, prompt=["fine", "x" * 600]))
        assert error["param"] == "prompt"
        answer(http, COMPLETIONS)
    assert engine.book.num_prompt_tokens == 2


# How an answer is sampled and where it ends: the engine's fields, from the body's


def test_fields_reach_the_engine(http):
    sampling = SamplingParams(
        temperature=0.7,
        top_k=50,
        top_p=0.9,
        min_p=0.01,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.3,
        logit_bias=((97, 3.0), (98, -100.0)),
        seed=9,
    )
    options = {"min_tokens": 3, "ignore_eos": True, "stop_ids": (120, 121)}
    (expected,) = real_engine().generate(
        [replace(ask("hi", max_tokens=30, **options), sampling=sampling)]
    )
    fields = {
        name: getattr(sampling, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty")
    }
    fields |= {"frequency_penalty": -0.5, "repetition_penalty": 1.3, "max_tokens": 30}
    fields |= {"min_tokens": 3, "ignore_eos": True, "stop_token_ids": [120, 121]}
    body = answer(http, COMPLETIONS, **fields, logit_bias={"97": 3, "98": -100})
    assert texts(body) == [expected.text]
    assert body["choices"][0]["finish_reason"] == expected.finish_reason


def test_what_clients_say_of_themselves_changes_nothing(http):
    plain = texts(answer(http, COMPLETIONS, seed=4))
    said = {"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    nulls = dict.fromkeys(["best_of", "suffix", "tools", "prediction"])
    assert texts(answer(http, COMPLETIONS, seed=4, **said, **nulls)) == plain


# Log-probabilities


@torch.inference_mode()
def oracle(ids):
    """The model's log-probabilities of each token after the first."""
    from engines import _model

    logits_TV = _model()(torch.tensor([ids]))[0]
    return logits_TV.double().log_softmax(dim=-1)


def check_top(top, row_V, count):
    """A table of the likeliest tokens against the model's own."""
    values, _ = row_V.topk(count)
    for value in values.tolist():
        assert any(math.isclose(found, value, abs_tol=1e-5) for found in top.values())
    assert max(top.values()) == pytest.approx(float(row_V.max()), abs=1e-5)


@pytest.mark.parametrize("is_echo", [True, False])
def test_log_probabilities_of_completions(http, is_echo):
    prompt = "hi é"
    body = answer(http, COMPLETIONS, prompt=prompt, logprobs=3, echo=is_echo, seed=4)
    (choice,) = body["choices"]
    told = choice["logprobs"]
    (plain,) = real_engine().generate([request_of(prompt)])
    prompt_ids = list(encode(prompt))
    ids = [*prompt_ids, *plain.token_ids]
    assert choice["text"] == (prompt if is_echo else "") + plain.text
    rows_TV = oracle(ids)
    start = 0 if is_echo else len(prompt_ids)
    assert {len(column) for column in told.values()} == {len(ids) - start}
    for place, index in enumerate(range(start, len(ids))):
        if index == 0:
            assert told["token_logprobs"][0] is None
            assert told["top_logprobs"][0] is None
            continue
        row_V = rows_TV[index - 1]
        assert told["token_logprobs"][place] == pytest.approx(float(row_V[ids[index]]), abs=1e-5)
        check_top(told["top_logprobs"][place], row_V, 3)
        assert told["tokens"][place] in told["top_logprobs"][place]
        assert len(told["top_logprobs"][place]) in (3, 4)
    if is_echo:
        assert told["tokens"][:5] == ["h", "i", " ", "bytes:\\xc3", "bytes:\\xa9"]
        assert told["text_offset"][:6] == [0, 1, 2, 3, 3, 4]


def test_log_probabilities_of_a_prompt_alone(http):
    ids = [list(encode("hello there")), list(encode("good"))]
    body = answer(http, COMPLETIONS, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert texts(body) == ["hello there", "good"]
    assert body["usage"]["completion_tokens"] == 0
    for choice, prompt in zip(body["choices"], ids, strict=True):
        assert choice["finish_reason"] == "length"
        rows_TV = oracle(prompt)
        expected = [float(rows_TV[n, token]) for n, token in enumerate(prompt[1:])]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-5)
    events = chunks(http, COMPLETIONS, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert joined(events) == ["hello there", "good"]


def test_echo_without_log_probabilities(http):
    plain = texts(answer(http, COMPLETIONS, seed=4, prompt=list(encode("hi"))))
    assert texts(answer(http, COMPLETIONS, seed=4, echo=True)) == ["hi" + plain[0]]
    assert texts(answer(http, COMPLETIONS, max_tokens=0, echo=True)) == ["hi"]


def test_log_probabilities_of_a_chat(http):
    prompt = render_chat(TOKENIZER, MESSAGES)
    body = answer(http, CHAT, logprobs=True, top_logprobs=2, seed=4)
    told = body["choices"][0]["logprobs"]["content"]
    (plain,) = real_engine().generate([request_of(prompt)])
    ids = [*encode(prompt), *plain.token_ids]
    rows_TV = oracle(ids)[len(encode(prompt)) - 1 :]
    assert len(told) == len(plain.token_ids) == body["usage"]["completion_tokens"]
    raw = b"".join(bytes(one["bytes"]) for one in told)
    assert raw.decode(errors="replace") == plain.text
    for one, token, row_V in zip(told, plain.token_ids, rows_TV, strict=False):
        assert one["logprob"] == pytest.approx(float(row_V[token]), abs=1e-5)
        expected = row_V.topk(2).values.tolist()
        assert [top["logprob"] for top in one["top_logprobs"]] == pytest.approx(expected, abs=1e-5)
        assert one.keys() == {"token", "logprob", "bytes", "top_logprobs"}
    none = answer(http, CHAT, logprobs=True, seed=4)["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in none] == [[]] * len(told)
    assert [one["logprob"] for one in none] == [one["logprob"] for one in told]
    assert answer(http, CHAT, logprobs=False)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_streamed_log_probabilities_are_those_of_the_whole(http, path):
    asked = {"seed": 4, "max_tokens": 40, "n": 2}
    asked |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    asked |= {} if path == CHAT else {"echo": True}
    whole = answer(http, path, **asked)["choices"]
    told = [{}, {}]
    for event in chunks(http, path, **asked):
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                told[choice["index"]].setdefault(name, []).extend(values)
    assert told == [choice["logprobs"] for choice in whole]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"logprobs": 3}, "logprobs"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"echo": True}, "echo"),
        (CHAT, {"max_completion_tokens": 0, "max_tokens": ...}, "max_completion_tokens"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"top_logprobs": 3}, "top_logprobs"),
        (COMPLETIONS, {"echo": "yes"}, "echo"),
        (COMPLETIONS, {"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    ],
    ids=str,
)
def test_fields_that_do_not_go_together(http, path, fields, param):
    assert error_of(post(http, path, **fields))["param"] == param


# Streams


def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = chunks(http, COMPLETIONS, seed=4, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 8
    assert last["choices"] == []


PIECES = ["a", "é", "🦙", "stop", "st", "op", " ", "\n", "s"]


def test_streams_say_what_whole_answers_say():
    """Whatever bytes a token holds, and wherever a stop string is cut."""

    class Saying(Scripted):
        def say(self, text):
            self.ids = TOKENIZER.encode(text + "<|im_end|>")
            self._prompt_ends.clear()

    executor = Saying()
    with (
        live(scripted_engine(executor)) as address,
        httpx.Client(base_url=address, timeout=30) as http,
    ):

        @settings(deadline=None, max_examples=60)
        @given(
            st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
            st.lists(st.sampled_from(["stop", "é", "\n", "a🦙"]), max_size=2),
            st.integers(1, 40),
        )
        def try_one(text, stops, max_tokens):
            executor.say(text)
            asked = {"stop": stops, "max_tokens": max_tokens}
            (whole,) = answer(http, COMPLETIONS, **asked)["choices"]
            events = chunks(http, COMPLETIONS, **asked)
            assert joined(events) == [whole["text"]]
            assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
            cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
            if max_tokens > len(text.encode()):
                assert whole["text"] == text[:cut]
                assert whole["finish_reason"] == "stop"

        try_one()
