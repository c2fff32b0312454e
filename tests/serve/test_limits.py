"""What a server does not take on: each limit at its bound, and what a client is told beyond it."""

from __future__ import annotations

import json
import threading

import httpx
import openai
import pytest
from engines import real_engine
from servers import (
    NAME,
    Gated,
    engine_around,
    live,
    metric,
    post,
    read_all,
    require_balanced,
    wait_until,
)

pytestmark = pytest.mark.cpu

COMPLETIONS = "/v1/completions"
BODY = {"model": NAME, "prompt": "hi", "max_tokens": 3, "temperature": 0}


def ask(address, *, key="", **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{address}{COMPLETIONS}", json=BODY | more, headers=headers, timeout=30)


def in_background(address, count, **more):
    """Sends requests and leaves them open; gives the threads and where their statuses will be."""
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(address, **more).status_code))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, statuses


def num_open(engine):
    return len(engine.book.running) + len(engine.waiting())


# The queue


def test_a_full_queue_says_when_to_come_again():
    gate = Gated()
    with live(engine_around(gate, max_sequences=1), max_queued_requests=2) as server:
        first, done_first = in_background(server.address, 1)
        assert gate.entered.wait(10)
        others, done_others = in_background(server.address, 2)
        wait_until(lambda: len(server.engine.waiting()) == 2)
        refused = ask(server.address)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["message"] == "too many requests wait"
        ready = httpx.get(f"{server.address}/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "the queue is full")
        assert httpx.get(f"{server.address}/health").status_code == 200
        told = httpx.get(f"{server.address}/metrics").text
        assert metric(told, "paceline_admission_rejections_total", reason="queue") == 1
        assert metric(told, "vllm:num_requests_waiting") == 2
        gate.opened.set()
        for thread in (*first, *others):
            thread.join()
        assert done_first + done_others == [200, 200, 200]
        assert httpx.get(f"{server.address}/ready").status_code == 200
        assert ask(server.address).status_code == 200


def test_a_queue_of_long_prompts_is_full_sooner():
    gate = Gated()
    with live(engine_around(gate, max_sequences=1), max_queued_tokens=50) as server:
        first, _ = in_background(server.address, 1, prompt="a" * 100)  # alone, of any length
        assert gate.entered.wait(10)
        second, _ = in_background(server.address, 1, prompt="a" * 100)
        wait_until(lambda: len(server.engine.waiting()) == 1)
        assert ask(server.address).status_code == 503
        gate.opened.set()
        for thread in (*first, *second):
            thread.join()


def test_a_race_for_the_last_place_in_the_queue_is_decided_by_the_engine():
    """Between the guard and the queue others may come: the engine has the last word."""
    gate = Gated()
    with live(engine_around(gate, max_sequences=1), max_queued_requests=3) as server:
        threads, statuses = in_background(server.address, 20)
        wait_until(lambda: len(statuses) >= 16)
        assert set(statuses) == {503}
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert 3 <= statuses.count(200) <= 4


# One key's share


def test_a_key_has_so_many_requests_open_and_others_are_not_harmed():
    gate = Gated()
    keys = ["sk-one", "sk-two"]
    with live(engine_around(gate), keys=keys, max_requests_per_key=2) as server:
        threads, statuses = in_background(server.address, 2, key="sk-one")
        wait_until(lambda: num_open(server.engine) == 2)
        refused = ask(server.address, key="sk-one")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        others, fine = in_background(server.address, 1, key="sk-two")
        wait_until(lambda: num_open(server.engine) == 3)
        gate.opened.set()
        for thread in (*threads, *others):
            thread.join()
        assert statuses + fine == [200, 200, 200]
        assert ask(server.address, key="sk-one").status_code == 200


def test_openais_client_comes_again_by_itself():
    gate = Gated()
    with (
        live(engine_around(gate), keys=["sk-one"], max_requests_per_key=1) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="sk-one", max_retries=3) as client,
    ):
        threads, _ = in_background(server.address, 1, key="sk-one")
        wait_until(lambda: num_open(server.engine) == 1)
        threading.Timer(0.3, gate.opened.set).start()
        completion = client.completions.create(model=NAME, prompt="hi", max_tokens=3)
        assert completion.choices[0].text == "aaa"
        threads[0].join()


# Sizes


@pytest.fixture(scope="module")
def small():
    """A server with small limits of size and time."""
    limits = {
        "max_body_bytes": 2000,
        "max_header_bytes": 4000,
        "max_headers": 20,
        "receive_timeout_s": 0.3,
    }
    with live(real_engine(), **limits) as server:
        yield server


def test_a_body_too_large_is_refused_before_it_comes(small):
    with small.connect() as connection:
        connection.sendall(post(COMPLETIONS, b"").replace(b"Length: 0", b"Length: 2001"))
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"a body may have 2000 bytes" in answer
    assert ask(small.address, prompt="a" * 100).status_code == 200


def test_a_body_without_a_length_is_refused(small):
    chunks = (part for part in (b"{", b"}"))
    answer = httpx.post(f"{small.address}{COMPLETIONS}", content=chunks)
    assert answer.status_code == 411


def test_a_length_beside_chunks_is_refused(small):
    """The chunks would hold, whatever the length says."""
    with small.connect() as connection:
        connection.sendall(post(COMPLETIONS, b"{}", "Transfer-Encoding: chunked"))
        assert connection.recv(65536).startswith((b"HTTP/1.1 411 ", b"HTTP/1.1 400 "))


def test_too_many_headers_are_refused(small):
    headers = {f"x-{number}": "1" for number in range(25)}
    assert httpx.get(f"{small.address}/health", headers=headers).status_code == 431
    headers = {"x-long": "a" * 3900}
    assert httpx.get(f"{small.address}/health", headers=headers).status_code == 431


def test_headers_without_an_end_are_refused(small):
    with small.connect() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x: " + b"a" * 300_000)
        assert read_all(connection).startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{small.address}/health").status_code == 200


def test_too_many_connections_are_told_so():
    with live(real_engine(), max_connections=3) as server:
        held = [server.connect() for _ in range(3)]
        wait_until(lambda: len(server.server.server_state.connections) == 3)
        with server.connect() as one_more:
            answer = read_all(one_more)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: " in answer
        for connection in held:
            connection.close()
        wait_until(lambda: not server.server.server_state.connections)
        assert httpx.get(f"{server.address}/health").status_code == 200


# Times


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_request_that_takes_too_long_is_ended(is_streamed):
    engine = engine_around(Gated(step_s=0.02))
    engine._executor.opened.set()
    with live(engine, request_timeout_s=0.3) as server:
        answer = ask(server.address, max_tokens=5000, stream=is_streamed)
        if is_streamed:
            assert answer.status_code == 200
            assert "error" in json.loads(answer.text.strip().splitlines()[-1][6:])
        else:
            assert answer.status_code in (503, 504)
            assert (answer.headers.get("x-should-retry") == "false") == (answer.status_code == 504)
        require_balanced(engine)
        assert ask(server.address).status_code == 200


def test_a_request_that_waits_too_long_is_ended():
    gate = Gated()
    with live(engine_around(gate, max_sequences=1), request_timeout_s=0.2) as server:
        threads, statuses = in_background(server.address, 1)
        assert gate.entered.wait(10)
        others, _ = in_background(server.address, 1)
        wait_until(lambda: len(server.engine.waiting()) == 1)
        threading.Timer(0.3, gate.opened.set).start()
        for thread in (*threads, *others):
            thread.join()
        told = httpx.get(f"{server.address}/metrics").text
        reasons = "paceline_request_success_total"
        assert metric(told, reasons, finished_reason="timeout") == 2
        assert set(statuses) <= {503, 504}


# Names


def test_every_answer_has_a_name(small):
    names = {
        httpx.get(f"{small.address}{path}").headers["x-request-id"]
        for path in ("/health", "/nowhere", "/v1/models")
    }
    assert len(names) == 3
    refused = httpx.post(f"{small.address}{COMPLETIONS}", content=b"{")
    assert refused.headers["x-request-id"] not in names


def test_what_fails_inside_is_logged_by_its_name_and_not_told(caplog):
    engine = real_engine()

    def fail(*_):
        raise ValueError("the secret address 0xdead")

    with live(engine) as server:
        engine.submit = fail
        answer = ask(server.address)
    assert answer.status_code == 500
    name = answer.headers["x-request-id"]
    assert answer.json()["error"]["message"] == f"request {name} failed"
    assert "0xdead" not in answer.text
    assert f"request {name} failed" in caplog.text
