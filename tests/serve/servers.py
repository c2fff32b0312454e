"""Servers for tests: the real one on a free port, around any engine, and raw connections to it."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from engines import SPEC, TOKENIZER, Scripted, serving

from paceline.plan.plan import LimitsConfig
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.server import listen, server_around
from paceline.serve.engine import Engine
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.stall_free import stall_free

NAME = "tiny"


@dataclass
class Live:
    """A running server."""

    address: str
    port: int
    server: uvicorn.Server
    engine: Engine

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection


@contextmanager
def live(engine: Engine, *, keys=(), runs_engine: bool = True, **limits) -> Iterator[Live]:
    """A server around an engine whose loop runs; limits are the plan's but for those given."""
    opener = ApiKeys(list(keys))
    listener = listen("127.0.0.1", 0, opener)
    server = server_around(engine, NAME, opener, LimitsConfig(**limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    with serving(engine) if runs_engine else _nothing():
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield Live(f"http://127.0.0.1:{port}", port, server, engine)
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            listener.close()
            assert not thread.is_alive()


@contextmanager
def _nothing():
    yield


class Gated(Scripted):
    """Computes no step before `opened` is set."""

    def __init__(self, text: str = "", **options) -> None:
        super().__init__(text, **options)
        self.opened, self.entered = threading.Event(), threading.Event()

    def run(self, step):
        self.entered.set()
        assert self.opened.wait(20)
        return super().run(step)


def engine_around(executor: Scripted, *, max_sequences: int = 8) -> Engine:
    """An engine on the machine's clock, so that deadlines pass."""
    return Engine(executor, stall_free, Budget(2048, max_sequences), SPEC, TOKENIZER)


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request as it goes over the wire."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", *headers))
    return head.encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    while True:
        try:
            part = connection.recv(65536)
        except ConnectionResetError:
            return received
        if not part:
            return received
        received += part


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits for what another thread or process does without saying so."""
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, "it does not come about"
        time.sleep(0.005)


def metric(text: str, name: str, **labels: str) -> float:
    """A number from Prometheus's text."""
    wanted = {"model_name": NAME} | labels
    for line in text.splitlines():
        found = re.fullmatch(rf"{re.escape(name)}\{{(.*)\}} (\S+)", line)
        if found and dict(re.findall(r'(\w+)="([^"]*)"', found[1])) == wanted:
            return float(found[2])
    raise AssertionError(f"no {name} with {wanted}")


def require_balanced(engine: Engine) -> None:
    """Every block is free or cached, once the engine has nothing to do."""
    wait_until(lambda: not engine.book and not engine.waiting())
    pool = engine.book.kv.pool
    pool.check()
    assert pool.num_held == 0
    assert pool.num_free == pool.num_blocks
