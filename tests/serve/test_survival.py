"""Crowds and fuzz: hundreds of connections at once, and whatever the schema allows."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from engines import real_engine
from hypothesis import HealthCheck, given, settings
from servers import NAME, live, post, require_balanced

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

BODY = {"model": NAME, "prompt": "hi", "max_tokens": 4, "temperature": 0}


async def visit(port, content):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(content)
    received = await reader.read()
    writer.close()
    return received


def test_five_hundred_connections_are_all_answered():
    content = post("/v1/completions", json.dumps(BODY).encode(), "Connection: close")

    async def crowd(port):
        return await asyncio.gather(*(visit(port, content) for _ in range(500)))

    with live(real_engine()) as server:
        answers = asyncio.run(crowd(server.port))
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in answers)
        texts = {
            json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] for answer in answers
        }
        assert len(texts) == 1
        assert httpx.get(f"{server.address}/health").status_code == 200
        require_balanced(server.engine)


def test_nothing_that_the_schema_allows_is_an_error_of_ours():
    import schemathesis

    with live(real_engine(), request_timeout_s=5.0) as server:
        schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")

        tried = 0
        for result in schema.get_all_operations():
            operation = result.ok()
            strategy = operation.as_strategy()

            @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
            @given(strategy)
            def fuzz(case):
                answer = case.call(timeout=30)
                assert answer.status_code < 500 or answer.status_code == 504, answer.text

            fuzz()
            tried += 1
        assert tried >= 6
        answer = httpx.post(f"{server.address}/v1/completions", json=BODY)
        assert answer.status_code == 200
        require_balanced(server.engine)
