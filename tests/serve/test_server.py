"""The server: its address, taken at once and not for strangers without keys, and its engine."""

from __future__ import annotations

import socket
import threading

import pytest
from engines import GREEDY, Scripted, encode, scripted_engine

from paceline.core.errors import PacelineError, UsageError
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.server import EngineThread, listen
from paceline.serve.engine import Engine
from paceline.serve.request import Request

pytestmark = pytest.mark.cpu

OPEN, CLOSED = ApiKeys([]), ApiKeys(["sk-one"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_loopback_needs_no_keys(host):
    with listen(host, 0, OPEN) as listener:
        assert listener.getsockname()[0].startswith("127.")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.0.1", "example.org"])
def test_other_addresses_need_keys(host):
    with pytest.raises(UsageError, match="loopback only") as caught:
        listen(host, 0, OPEN)
    assert "--api-key-file" in caught.value.hint


def test_with_keys_any_address_will_do():
    with listen("0.0.0.0", 0, CLOSED) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_an_address_is_taken_as_soon_as_it_is_listened_to():
    """Before the model is loaded: of two servers that start at once, one is told."""
    with listen("127.0.0.1", 0, OPEN) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            PacelineError, match=f"cannot listen on 127.0.0.1 port {port}"
        ) as caught:
            listen("127.0.0.1", port, OPEN)
        assert caught.value.exit_code == 1
        assert "another --port" in caught.value.hint
    with listen("127.0.0.1", port, OPEN) as again:
        assert again.getsockname()[1] == port


def test_a_port_that_another_program_has():
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(PacelineError, match="Address already in use"),
    ):
        listen("127.0.0.1", other.getsockname()[1], OPEN)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_addresses_that_cannot_be(host):
    with pytest.raises(PacelineError, match=f"cannot listen on {host} port 0: "):
        listen(host, 0, CLOSED)


# The engine's thread


def test_an_engine_is_loaded_where_it_computes():
    names: set[str] = set()

    class Noting(Scripted):
        def run(self, step):
            names.add(threading.current_thread().name)
            return super().run(step)

    def load() -> Engine:
        names.add(threading.current_thread().name)
        return scripted_engine(Noting("an answer"))

    thread = EngineThread(load)
    ended = threading.Event()
    request = Request(prompt_ids=encode("hi"), sampling=GREEDY, max_tokens=3)
    thread.engine.submit(request, lambda delta: ended.set() if delta.finish_reason else None)
    assert ended.wait(10)
    thread.stop()
    assert names == {"engine"}
    assert not thread.engine.is_healthy


def test_what_loading_raises_reaches_who_asked():
    def load() -> Engine:
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        EngineThread(load)


def test_an_engine_that_fails_ends_its_thread_alone():
    thread = EngineThread(lambda: scripted_engine(Scripted(fail_at=1)))
    ended = threading.Event()
    request = Request(prompt_ids=encode("hi"), sampling=GREEDY, max_tokens=3)
    thread.engine.submit(request, lambda delta: ended.set() if delta.finish_reason else None)
    assert ended.wait(10)
    thread.stop()
    assert not thread.engine.is_healthy
