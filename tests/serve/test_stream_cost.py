"""What streams cost the event loop, which shares its cores with the model."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time

import pytest
from asking import CHAT, MESSAGES, NAME, live
from engines import SPEC, TOKENIZER, Scripted

from paceline.serve.engine import Engine
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.stall_free import stall_free

pytestmark = pytest.mark.cpu

NUM_STREAMS, NUM_TOKENS = 32, 100
SHARE, TOKENS_PER_S = 0.1, 12
"""Of a core, while each stream gets so many."""


def ask(address, max_tokens):
    """Begins a stream on a bare socket, whose reading costs next to nothing."""
    host, port = address.removeprefix("http://").split(":")
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": max_tokens, "stream": True}
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + content)
    return connection


def read(connection):
    """The events of a stream."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    connection.close()
    return b"".join(parts).count(b"data: ")


@pytest.mark.slow
def test_streams_leave_the_cores_to_the_model():
    executor = Scripted(step_s=0.02)
    engine = Engine(executor, stall_free, Budget(2048, NUM_STREAMS), SPEC, TOKENIZER)
    with live(engine) as address:
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "server"]
        clock = time.pthread_getcpuclockid(thread.ident)
        assert read(ask(address, 3)) > 3
        start_s = time.clock_gettime(clock)
        connections = [ask(address, NUM_TOKENS) for _ in range(NUM_STREAMS)]
        num_events = sum(map(read, connections))
        used_s = time.clock_gettime(clock) - start_s
    assert num_events > NUM_STREAMS * NUM_TOKENS / 2
    per_token_s = used_s / (NUM_STREAMS * NUM_TOKENS)
    logging.getLogger(__name__).info("%.0f us a token, %d events", per_token_s * 1e6, num_events)
    assert per_token_s * NUM_STREAMS * TOKENS_PER_S < SHARE
