"""Classes of attack that have felled other servers, one test or more for each, and a bound beside.

Those on templates, tensors, grammars and tools stand with what they attack; here is what comes in
through HTTP. After each, the server answers as before.
"""

from __future__ import annotations

import ast
import inspect
import json
import logging
import socket
import statistics
import time
from pathlib import Path

import httpx
import pytest
from engines import real_engine
from servers import (
    NAME,
    Gated,
    engine_around,
    live,
    post,
    read_all,
    require_balanced,
    wait_until,
)

import paceline
from paceline.serve.api import keys as keys_module
from paceline.serve.api.keys import ApiKeys

pytestmark = pytest.mark.cpu

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"model": NAME, "prompt": "hi", "max_tokens": 3, "temperature": 0}
SOURCE = Path(paceline.__file__).parent


@pytest.fixture(scope="module")
def target():
    with live(real_engine(), receive_timeout_s=0.4) as server:
        yield server
        require_balanced(server.engine)


@pytest.fixture(autouse=True)
def lives_on(request):
    """Whatever a test did, the next request gets the answer that it always gets."""
    yield
    if "target" in request.fixturenames:
        server = request.getfixturevalue("target")
        answer = send(server, BODY)
        assert answer.status_code == 200
        assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}


def send(server, body, path=COMPLETIONS, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | headers
    return httpx.post(f"{server.address}{path}", content=content, headers=headers, timeout=30)


# 1, 2, 4, 13: code and data stay apart


def test_nothing_unpickles_evaluates_or_loads_tensors_from_outside():
    """In all that a server runs; ruff forbids the import of pickle besides."""
    forbidden = {"eval", "exec", "compile", "__import__"}
    files = [*(SOURCE / "serve").rglob("*.py"), *(SOURCE / "decode").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in forbidden, f"{path}: {node.func.id}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & {"pickle", "marshal", "shelve", "dill"}, path


# 3, 4, 8: what a client may not send


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{{ cycler.__init__.__globals__ }}"},
        {"chat_template_kwargs": {"x": 1}},
        {"prompt_embeds": "AAAA"},
        {"documents": [{"text": "x"}]},
        {"guided_regex": "(a+)+$"},
        {"extra_body": {}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_templates_tensors_and_unknown_fields_are_refused_by_name(target, field):
    chat = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    for path, body in ((CHAT, chat), (COMPLETIONS, BODY)):
        answer = send(target, body | field, path)
        assert answer.status_code == 400
        assert next(iter(field)) in answer.json()["error"]["message"]


def test_no_url_is_fetched(target):
    with socket.create_server(("127.0.0.1", 0)) as decoy:
        decoy.settimeout(0.2)
        url = f"http://127.0.0.1:{decoy.getsockname()[1]}/picture.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": NAME, "messages": [{"role": "user", "content": [part]}]}
        assert send(target, body, CHAT).status_code == 400
        with pytest.raises(TimeoutError):
            decoy.accept()


def test_a_template_in_a_message_is_text(target):
    text = "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}"
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    assert send(target, body, CHAT).status_code == 200


# 5: integers and sizes

HUGE = [-(2**63), -1, 2**31, 2**63, 10**30, 1e308]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("field", ["n", "max_tokens", "top_k", "logprobs", "min_tokens", "best_of"])
def test_numbers_out_of_range_are_refused(target, field, value):
    answer = send(target, BODY | {field: value})
    assert answer.status_code in (200, 400)
    if field in ("n", "max_tokens", "logprobs", "min_tokens", "best_of"):
        assert answer.status_code == 400


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("field", ["temperature", "top_p", "seed", "max_tokens"])
def test_numbers_that_are_none_are_refused(target, field, text):
    content = json.dumps(BODY | {field: "@"}).replace('"@"', text).encode()
    assert send(target, content).status_code == 400


@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_nesting_without_an_end_is_refused(target, bracket):
    content = b'{"model": "tiny", "prompt": ' + bracket.encode() * 200_000
    assert send(target, content).status_code == 400


def test_lists_without_an_end_are_refused(target):
    assert send(target, BODY | {"stop": ["x"] * 10_000}).status_code == 400
    assert send(target, BODY | {"stop": "x" * 100_000}).status_code == 400


@pytest.mark.parametrize("text", ["\\ud800", "\\udfff\\ud800", "a\\u0000b"])
def test_text_that_is_no_text_harms_nobody(target, text):
    content = json.dumps(BODY | {"prompt": "@"}).replace("@", text).encode()
    assert send(target, content).status_code in (200, 400)


def test_bytes_that_are_no_text_are_refused(target):
    assert send(target, b'{"model": "tiny", "prompt": "\xff\xfe"}').status_code == 400


# 7: what kills engines


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [-1], [2**31], [10**6], [[1], [10**6]], "a" * 5000, [1] * 100_000]
)
def test_prompts_that_no_model_can_read_are_refused(target, prompt):
    assert send(target, BODY | {"prompt": prompt}).status_code == 400


@pytest.mark.parametrize("room", [0, 1, 2])
def test_prompts_at_the_edge_of_the_context(target, room):
    length = target.engine.spec.max_positions - room
    answer = send(target, BODY | {"prompt": "a" * length, "max_tokens": 1})
    assert answer.status_code == (200 if room else 400)


def test_a_prompt_larger_than_all_blocks_is_refused_and_blocks_nobody():
    with live(real_engine(num_blocks=4)) as server:
        answer = send(server, BODY | {"prompt": "a" * 100})
        assert answer.status_code == 400
        assert "memory" in answer.json()["error"]["message"]
        assert send(server, BODY).status_code == 200
        require_balanced(server.engine)


# 9: keys


def test_keys_are_compared_in_constant_time():
    """By `compare_digest` over digests, all of them whatever the first says; so says the clock."""
    assert "compare_digest" in inspect.getsource(keys_module)
    held = ApiKeys([f"sk-{number:064d}" for number in range(200)])

    def cost_s(key):
        times = []
        for _ in range(60):
            start_s = time.perf_counter()
            held.opens(f"Bearer {key}")
            times.append(time.perf_counter() - start_s)
        return statistics.median(times)

    first, last, wrong = f"sk-{0:064d}", f"sk-{199:064d}", "sk-" + "x" * 64
    assert held.opens(f"Bearer {first}")
    assert held.opens(f"Bearer {last}")
    costs_s = [cost_s(key) for key in (first, last, wrong)]
    assert max(costs_s) < 2 * min(costs_s)


@pytest.mark.parametrize(
    "path",
    ["/ready", "/metrics", "/health/deep", "/openapi.json", "/v1/models", "//health", "/health/",
     "/health/..", "/health/../metrics", "/page/../metrics", "/%6detrics", "/HEALTH", "/health%2f"],
)  # fmt: skip
def test_no_path_leads_round_the_keys(path):
    with live(real_engine(), keys=["sk-one"]) as server, server.connect() as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert read_all(connection).startswith(b"HTTP/1.1 401 ")


def test_a_key_in_any_other_place_opens_nothing():
    with live(real_engine(), keys=["sk-one"]) as server:
        for headers in (
            {"x-api-key": "sk-one"},
            {"authorization": "sk-one"},
            {"authorization": "Basic sk-one"},
            {"authorization": "Bearer sk-one "[:-1] + "\u00e9"},
            {"cookie": "key=sk-one"},
        ):
            raw = [(name, value.encode("latin-1")) for name, value in headers.items()]
            answer = httpx.get(f"{server.address}/v1/models?api_key=sk-one", headers=raw)
            assert answer.status_code == 401


def test_pages_of_other_sites_are_not_answered(target):
    """By CORS, by a form, or by a name of theirs that leads to this machine."""
    foreign = send(target, BODY, origin="https://evil.example")
    assert foreign.status_code == 403
    assert not any(name.startswith("access-control-") for name in foreign.headers)
    assert send(target, BODY, host="evil.example").status_code == 403
    assert send(target, BODY, origin="null").status_code == 403
    port = target.port
    here = {"origin": f"http://localhost:{port}", "host": f"localhost:{port}"}
    assert send(target, BODY, **here).status_code == 200


def test_the_page_trusts_nobody_else(target):
    headers = httpx.get(f"{target.address}/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"


# 10: tenants


def test_what_one_key_has_asked_is_not_in_the_cache_for_another():
    """Neither quicker nor counted as found: there is nothing to measure."""
    prompt = "the secret of the first tenant is forty-two, and long enough for blocks"
    with live(real_engine(), keys=["sk-one", "sk-two"]) as server:

        def found_by(key):
            before = server.engine.book.num_found_tokens
            answer = send(server, BODY | {"prompt": prompt}, authorization=f"Bearer {key}")
            assert answer.status_code == 200
            return server.engine.book.num_found_tokens - before

        assert found_by("sk-one") == 0
        assert found_by("sk-one") > 0
        assert found_by("sk-two") == 0
        assert found_by("sk-two") > 0


# 11: what errors tell


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\x00" * 100])
def test_errors_hold_no_address_path_or_trace(target, body):
    answer = send(target, body)
    assert answer.status_code == 400
    for secret in ("0x", "/home", "/work", "site-packages", "Traceback", ".py"):
        assert secret not in answer.text
    assert "server" not in answer.headers


# 12: slow ones, and those who leave


@pytest.mark.parametrize(
    "said", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n", post(COMPLETIONS, b"{}" * 50)[:-60]]
)
def test_a_request_that_trickles_in_is_ended(target, said):
    """Each byte in time is not enough: the whole has its time."""
    with target.connect() as connection:
        connection.sendall(said)
        start_s = time.monotonic()
        try:
            while time.monotonic() - start_s < 10:
                connection.settimeout(0.05)
                try:
                    if not (answer := connection.recv(1000)):
                        break
                    assert answer.startswith(b"HTTP/1.1 408 ")
                except TimeoutError:
                    connection.sendall(b"x" if said else b"")
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert 0.3 < time.monotonic() - start_s < 5
    wait_until(lambda: len(target.server.server_state.connections) == 0)


def test_hundreds_of_slow_ones_keep_nobody_waiting(target):
    slow = [target.connect() for _ in range(200)]
    for connection in slow:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
    assert send(target, BODY).status_code == 200
    for connection in slow:
        connection.close()


def test_a_stream_that_nobody_reads_is_cut_off_and_its_request_ended():
    executor = Gated()
    executor.opened.set()
    limits = {"max_unread_bytes": 2000, "unread_timeout_s": 0.3}
    with live(engine_around(executor), **limits) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = BODY | {"stream": True, "max_tokens": 90_000}
        connection.sendall(post(COMPLETIONS, json.dumps(body).encode()))
        wait_until(lambda: len(server.engine.book.running) == 1)
        wait_until(lambda: not server.server.server_state.connections)
        require_balanced(server.engine)
        assert send(server, BODY).status_code == 200
        connection.close()


def test_a_client_that_reads_slowly_but_reads_gets_everything():
    executor = Gated()
    executor.opened.set()
    with live(engine_around(executor), max_unread_bytes=2000, unread_timeout_s=5.0) as server:
        with server.connect() as connection:
            body = BODY | {"stream": True, "max_tokens": 300}
            content = post(COMPLETIONS, json.dumps(body).encode(), "Connection: close")
            connection.sendall(content)
            time.sleep(0.3)
            received = read_all(connection)
        assert b"data: [DONE]" in received
        events = [line for line in received.splitlines() if line.startswith(b"data: {")]
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in events]
        assert "".join(texts) == 300 * "a"
        require_balanced(server.engine)


# 13: logs


def test_nothing_that_a_client_sends_becomes_a_line_of_the_log(target, caplog):
    with caplog.at_level(logging.WARNING):
        forged = "tiny\r\nCRITICAL root all is lost"
        send(target, BODY | {"model": forged})
        send(target, BODY | {forged: 1})
        httpx.get(f"{target.address}/{'%0d%0aCRITICAL root all is lost'}")
    assert "all is lost" not in caplog.text


def test_requests_in_one_packet_are_answered_in_order(target):
    one = post(COMPLETIONS, json.dumps(BODY).encode())
    last = post(COMPLETIONS, json.dumps(BODY).encode(), "Connection: close")
    with target.connect() as connection:
        connection.sendall(one + one + last)
        received = read_all(connection)
    assert received.count(b"HTTP/1.1 200 ") == 3
