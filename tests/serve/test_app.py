"""The HTTP API, through a real server: OpenAI's client, plain requests, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time

import httpx
import openai
import pydantic
import pytest
from asking import CHAT, COMPLETIONS, MESSAGES, NAME, error_of, live, post
from engines import SPEC, TOKENIZER, Scripted, ask, real_engine, scripted_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.models.chat import render_chat
from paceline.serve.api.guard import MAX_BODY_BYTES
from paceline.serve.api.schema import ChatBody, CompletionBody

pytestmark = pytest.mark.cpu

KEY = "sk-one"


@pytest.fixture(scope="module")
def address():
    """A server around a real tiny model, open to all."""
    with live(real_engine()) as address:
        yield address


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected_answer(prompt, *, max_tokens, seed):
    """What the engine says without a server."""
    return real_engine().generate([ask(prompt, max_tokens=max_tokens, seed=seed)])[0]


CHAT_PROMPT = render_chat(TOKENIZER, MESSAGES)


# OpenAI's own client.


def test_chat(client):
    answer = expected_answer(CHAT_PROMPT, max_tokens=12, seed=4)
    completion = client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=12, seed=4
    )
    assert completion.object == "chat.completion"
    assert completion.model == NAME
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == answer.text
    assert completion.choices[0].finish_reason == answer.finish_reason
    assert completion.usage.prompt_tokens == len(TOKENIZER.encode(CHAT_PROMPT))
    assert completion.usage.completion_tokens == len(answer.token_ids)
    assert completion.usage.total_tokens == len(TOKENIZER.encode(CHAT_PROMPT)) + 12


@pytest.mark.parametrize("with_usage", [True, False])
def test_chat_in_a_stream(client, with_usage):
    answer = expected_answer(CHAT_PROMPT, max_tokens=12, seed=4)
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=MESSAGES, max_tokens=12, seed=4, stream=True, **options
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    if with_usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage.completion_tokens == 12
        assert last.usage.prompt_tokens == len(TOKENIZER.encode(CHAT_PROMPT))
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(parts) == answer.text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_comes_as_it_is_made(path):
    executor = Scripted(step_s=0.01)
    with live(scripted_engine(executor)) as address, httpx.Client(base_url=address) as http:
        body = {"model": NAME, "max_tokens": 40, "stream": True}
        body |= {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
        with http.stream("POST", path, json=body) as response:
            counts = [len(executor.steps) for line in response.iter_lines() if "a" in line[6:]]
    assert counts[0] < 10
    assert len(counts) > 20


def test_completions(client):
    answer = expected_answer("once", max_tokens=16, seed=4)
    completion = client.completions.create(model=NAME, prompt="once", seed=4)
    assert completion.object == "text_completion"
    assert completion.choices[0].text == answer.text
    assert completion.usage.completion_tokens == 16  # the API's default
    chunks = list(client.completions.create(model=NAME, prompt="once", seed=4, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.text
    assert chunks[-1].choices[0].finish_reason == answer.finish_reason


def test_the_asynchronous_client(address):
    async def ask_both():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            create = client.chat.completions.create
            options = {"model": NAME, "messages": MESSAGES, "max_tokens": 12}
            whole = await asyncio.gather(*(create(**options, seed=seed) for seed in range(4)))
            stream = await create(**options, seed=2, stream=True)
            parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return [completion.choices[0].message.content for completion in whole], "".join(parts)

    whole, streamed = asyncio.run(ask_both())
    expected = [expected_answer(CHAT_PROMPT, max_tokens=12, seed=n).text for n in range(4)]
    assert whole == expected
    assert len(set(expected)) == 4
    assert streamed == expected[2]


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == NAME
    assert model.object == "model"


def test_errors_are_those_of_openai_s_client(client):
    with pytest.raises(openai.NotFoundError, match=r"no model 'other'"):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES, modalities=["text"])
    assert caught.value.param == "modalities"


# What is asked is what is done.


def text_of(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_a_seed_repeats_and_no_seed_does_not(http):
    same = {text_of(post(http, COMPLETIONS, seed=5)) for _ in range(3)}
    assert len(same) == 1
    assert len({text_of(post(http, COMPLETIONS)) for _ in range(4)}) > 1


def test_temperature_zero_and_top_k_one_are_greedy(http):
    greedy = expected_answer("hi", max_tokens=8, seed=None).text
    assert text_of(post(http, COMPLETIONS, temperature=0)) == greedy
    assert text_of(post(http, COMPLETIONS, top_k=1)) == greedy
    assert text_of(post(http, COMPLETIONS, top_p=1e-9)) == greedy
    assert text_of(post(http, COMPLETIONS, seed=5)) != greedy


def test_stop_strings(http):
    whole = text_of(post(http, COMPLETIONS, seed=5, max_tokens=60))
    stop = next(c for c in whole if c.isascii() and c.isprintable())
    for value in (stop, ["not in it", stop]):
        response = post(http, COMPLETIONS, seed=5, max_tokens=60, stop=value)
        assert text_of(response) == whole[: whole.index(stop)]
        assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_content_in_parts_is_content(http):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    in_parts = post(http, CHAT, seed=5, messages=[{"role": "user", "content": parts}])
    assert text_of(in_parts) == text_of(post(http, CHAT, seed=5))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_limits_have_two_names_in_chat(http, name):
    response = post(http, CHAT, **{"max_tokens": ...} | {name: 5})
    assert response.json()["usage"]["completion_tokens"] <= 5


def test_chat_without_a_limit_may_fill_the_context():
    with live(scripted_engine(Scripted("hello<|im_end|>"))) as address:
        response = httpx.post(address + CHAT, json={"model": NAME, "messages": MESSAGES})
    assert text_of(response) == "hello"
    assert response.json()["usage"]["completion_tokens"] == 6


def test_what_is_null_is_absent(http):
    nothing = dict.fromkeys(["temperature", "top_p", "stop", "n", "stream", "stream_options"])
    assert text_of(post(http, COMPLETIONS, seed=5, **nothing)) == text_of(
        post(http, COMPLETIONS, seed=5)
    )


# What is refused.

BAD_FIELDS = [
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"store": True}, "store"),
    ({"user": "x" * 513}, "user"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"tools": []}, "tools"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 10**30}, "n"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"min_p": 1.1}, "min_p"),
    ({"min_tokens": 9}, "min_tokens"),
    ({"stop_token_ids": [1] * 17}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 511}, "max_tokens"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "7"}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["ok", 3]}, "stop.1"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"model": 3}, "model"),
    ({"model": ...}, "model"),
]
BAD_MESSAGES = [
    ([], "messages"),
    (..., "messages"),
    ("hi", "messages"),
    ([{"role": "user"}], "messages.0.content"),
    ([{"role": "wizard", "content": "x"}], "messages.0.role"),
    ([{"role": "tool", "content": "x"}], "messages.0.tool_call_id"),
    ([{"role": "user", "content": "x", "tool_call_id": "1"}], "messages.0.tool_call_id"),
    ([*MESSAGES, {"role": "user", "content": 3}], "messages.1.content"),
    ([{"role": "user", "content": []}], "messages.0.content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.type"),
    ([{"role": "user", "content": "x", "name": "y"}], "messages.0.name"),
    ([{"role": "user", "content": "x" * 600}], "messages"),
]
BAD_PROMPTS = [("", "prompt"), (..., "prompt"), ([], "prompt"), ([[]], "prompt.0")]
BAD_PROMPTS += [([259], "prompt"), ([-1], "prompt.0"), (["hi", "ho", 5], "prompt.2")]
BAD_PROMPTS += [(["hi"] * 65, "prompt"), (["hi", ""], "prompt"), ([[5], [2**31]], "prompt.1.0")]
BAD_PROMPTS += [("x" * 512, "prompt"), ("x" * 600, "prompt")]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("body", "param"), BAD_FIELDS, ids=str)
def test_bad_fields_are_named(http, path, body, param):
    error = error_of(post(http, path, **body))
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize(("messages", "param"), BAD_MESSAGES, ids=range(len(BAD_MESSAGES)))
def test_bad_messages_are_named(http, messages, param):
    error = error_of(post(http, CHAT, messages=messages))
    assert error["param"] == param


@pytest.mark.parametrize(("prompt", "param"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_bad_prompts_are_named(http, prompt, param):
    error = error_of(post(http, COMPLETIONS, prompt=prompt))
    assert error["param"] == param


def test_a_prompt_that_is_too_long_is_told_how_long_it_may_be(http):
    error = error_of(post(http, COMPLETIONS, prompt="x" * 600))
    assert "the prompt has 600 tokens, the context 512" in error["message"]
    assert "at most 511" in error["message"]


def test_two_names_of_one_limit(http):
    error = error_of(post(http, CHAT, max_completion_tokens=5))
    assert error["param"] == "max_completion_tokens"
    error = error_of(post(http, CHAT, max_tokens=..., max_completion_tokens=511))
    assert error["param"] == "max_completion_tokens"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        (b'"prompt": "\\ud800"', "prompt"),
        (b'"prompt": "x", "\\ud800": 1', None),
        (b'"prompt": "x", "logit_bias": {"\\ud800": 1}', "logit_bias"),
        (b'"prompt": "x", "stop": "\\ud800"', "stop"),
        (b'"prompt": ["\\ud800"]', "prompt"),
    ],
)
def test_half_a_character(http, field, param):
    headers = {"content-type": "application/json"}
    content = b'{"model": "tiny", ' + field + b"}"
    error = error_of(http.post(COMPLETIONS, content=content, headers=headers))
    found = error["param"]
    assert found == param if param is None else found.split(".")[0] == param


def test_half_a_model(http):
    body = b'{"model": "\\ud800", "prompt": "x"}'
    headers = {"content-type": "application/json"}
    response = http.post(COMPLETIONS, content=body, headers=headers)
    assert response.status_code in (400, 404)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{'a': 1}"])
def test_a_body_that_is_no_object(http, body):
    headers = {"content-type": "application/json"}
    error = error_of(http.post(CHAT, content=body, headers=headers))
    assert error["param"] is None
    assert error["message"].startswith("body: ")


MANY = 100_000
MISTAKEN = [
    {"prompt": [""] * MANY + [5]},
    {"prompt": [5] * MANY + ["x"] * MANY},
    {"prompt": [[5.5] * MANY]},
    {"prompt": "x", "stop": [1] * MANY},
    {"prompt": "x", "stop_token_ids": ["x"] * MANY},
    {"prompt": "x", "logit_bias": {str(n): "x" for n in range(MANY)}},
    {"prompt": "x", "metadata": {str(n): 1 for n in range(MANY)}},
    {"prompt": "x", **{f"field{n}": 1 for n in range(MANY)}},
    {"messages": [1] * MANY},
    {"messages": [{"role": "user", "content": [1] * MANY}]},
    {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]},
    {"messages": MESSAGES, "tools": [1] * MANY},
]


@pytest.mark.parametrize("body", MISTAKEN, ids=range(len(MISTAKEN)))
def test_a_body_of_many_mistakes_is_refused_for_a_few(body):
    with pytest.raises(pydantic.ValidationError) as caught:
        (ChatBody if "messages" in body else CompletionBody).model_validate({"model": NAME} | body)
    assert caught.value.error_count() < 5


def test_a_body_nested_too_deep(http):
    body = b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    headers = {"content-type": "application/json"}
    error_of(http.post(CHAT, content=body, headers=headers))


def test_an_unknown_model(http):
    error = error_of(post(http, CHAT, model="other"), 404)
    assert error["param"] == "model"
    assert "tiny" in error["message"]


def test_unknown_paths_and_methods(http):
    assert error_of(http.get("/v1/nothing"), 404)["message"] == "Not Found"
    assert error_of(http.get(CHAT), 405)["message"] == "Method Not Allowed"


def test_a_body_that_is_too_large(http):
    error = error_of(http.post(CHAT, content=b"x" * (MAX_BODY_BYTES + 1)), 413)
    assert str(MAX_BODY_BYTES) in error["message"]
    error_of(http.post(CHAT, content=b"x" * MAX_BODY_BYTES), 400)


def test_a_body_without_a_length(http):
    error = error_of(http.post(CHAT, content=iter([b"{}"])), 411)
    assert "Content-Length" in error["message"]


NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FIELDS = ["model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "seed"]
FIELDS += ["stop", "n", "stream", "stream_options", "max_completion_tokens", "tools"]


def test_no_body_breaks_the_server():
    with (
        live(scripted_engine(Scripted("hi<|im_end|>"))) as address,
        httpx.Client(base_url=address) as http,
    ):

        @settings(deadline=None, max_examples=100)
        @given(
            st.sampled_from([CHAT, COMPLETIONS]), st.dictionaries(st.sampled_from(FIELDS), VALUES)
        )
        def try_one(path, changes):
            response = post(http, path, **changes)
            assert response.status_code in (200, 400, 404), response.text
            if response.status_code != 200:
                assert response.json()["error"]["message"]

        try_one()
        assert http.get("/health").status_code == 200


# Keys.


def test_keys():
    with (
        live(real_engine(), keys=[KEY, "sk-two"]) as address,
        httpx.Client(base_url=address) as http,
    ):
        for authorization in (None, "", KEY, "Bearer", "Bearer x", "Bearer sk-on", f"Basic {KEY}"):
            headers = {"authorization": authorization} if authorization is not None else {}
            for response in (
                http.get("/v1/models", headers=headers),
                http.post(CHAT, headers=headers, json={"model": NAME, "messages": MESSAGES}),
                http.get("/openapi.json", headers=headers),
            ):
                error = error_of(response, 401)
                assert error["type"] == "authentication_error"
                assert KEY not in response.text
        assert http.get("/health").status_code == 200
        for key in (KEY, "sk-two"):
            headers = {"authorization": f"Bearer {key}"}
            assert http.get("/v1/models", headers=headers).status_code == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
            assert client.models.list().data[0].id == NAME
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


# Health, and engines that fail.


def test_health(http):
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"status": "ok"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_engine_that_fails(path):
    engine = scripted_engine(Scripted(fail_at=4))
    with live(engine) as address, httpx.Client(base_url=address) as http:
        error = error_of(post(http, path), 503)
        assert error["type"] == "server_error"
        assert http.get("/health").status_code == 503
        error = error_of(post(http, path), 503)  # and one that comes after
        assert error["type"] == "server_error"
        assert "fire" not in error["message"]


def test_an_engine_that_fails_in_a_stream():
    engine = scripted_engine(Scripted(fail_at=4))
    with live(engine) as address, httpx.Client(base_url=address) as http:
        lines = post(http, COMPLETIONS, stream=True).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "aaa"
    assert events[-1]["error"]["type"] == "server_error"
    assert "[DONE]" not in lines[-1]


# Clients that leave, and requests beside each other.


def wait_until(is_so, timeout_s=10.0):
    end_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.01)


def send(address, body, path=COMPLETIONS):
    """Sends a request on a bare socket."""
    host, port = address.removeprefix("http://").split(":")
    what = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    content = json.dumps({"model": NAME, "max_tokens": 90_000} | what | body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def hang_up(address, body, path):
    send(address, body, path).close()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_at_once(is_stream, path):
    executor = Scripted(step_s=0.005)
    with live(scripted_engine(executor)) as address, httpx.Client(base_url=address) as http:
        for number in range(5):
            hang_up(address, {"stream": is_stream}, path)
            wait_until(lambda number=number: len(executor.released) > number)
        assert text_of(post(http, path, max_tokens=3)) == "aaa"


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_ends_its_request(is_stream):
    executor = Scripted(step_s=0.005)
    with live(scripted_engine(executor)) as address:
        with send(address, {"stream": is_stream}) as connection:
            wait_until(lambda: len(executor.steps) > 3)
            if is_stream:
                assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: executor.released == [0])
        num_steps = len(executor.steps)
        assert num_steps < 2000  # of 90,000
        # And the next request has the engine for itself.
        response = httpx.post(
            address + COMPLETIONS, json={"model": NAME, "prompt": "hi", "max_tokens": 3}
        )
        assert text_of(response) == "aaa"
        assert len(executor.steps) == num_steps + 3


def test_a_client_that_leaves_while_it_waits_its_turn():
    executor = Scripted(step_s=0.005)
    body = {"model": NAME, "prompt": "hi", "max_tokens": 90_000}
    with (
        live(scripted_engine(executor)) as address,
        httpx.Client(base_url=address, timeout=30) as http,
    ):
        first = threading.Thread(target=lambda: post(http, COMPLETIONS, max_tokens=400))
        first.start()
        wait_until(lambda: len(executor.steps) > 3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + COMPLETIONS, json=body, timeout=0.1)
        wait_until(lambda: 1 in executor.released)
        first.join()
        assert len(executor.steps) == 400
        assert sorted(executor.released) == [0, 1]


def test_bad_requests_do_not_disturb_a_running_one():
    with live(real_engine()) as address, httpx.Client(base_url=address, timeout=30) as http:
        alone = text_of(post(http, COMPLETIONS, seed=9, max_tokens=120, prompt="alone"))
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(
                text_of(post(http, COMPLETIONS, seed=9, max_tokens=120, prompt="alone"))
            )
        )
        thread.start()
        num_bad = 0
        while thread.is_alive():
            for body in ({"prompt": "x" * 600}, {"top_p": 7}, {"model": "other"}, {"stop": ""}):
                assert post(http, COMPLETIONS, **body).status_code in (400, 404)
                num_bad += 1
        thread.join()
    assert num_bad >= 4
    assert answers == [alone]


def test_many_clients_at_once():
    with live(real_engine()) as address, httpx.Client(base_url=address, timeout=60) as http:
        answers = {}

        def ask_for(seed):
            answers[seed] = text_of(post(http, COMPLETIONS, seed=seed, prompt=f"p{seed}"))

        threads = [threading.Thread(target=ask_for, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = real_engine().generate(
        [ask(f"p{seed}", seed=seed, max_tokens=8) for seed in range(12)]
    )
    assert answers == {seed: answer.text for seed, answer in enumerate(expected)}


def test_the_context_of_the_scripted_engine_is_long():
    assert SPEC.max_positions > 90_000  # or the tests above would end by themselves
