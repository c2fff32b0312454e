"""The server's address: taken at once, and not for strangers without keys."""

from __future__ import annotations

import socket

import pytest

from paceline.core.errors import PacelineError, UsageError
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.server import listen

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
