"""The server: an address, an engine on its own thread, and a way to stop."""

from __future__ import annotations

import ipaddress
import socket
import threading

import uvicorn

from paceline.core.errors import PacelineError, UsageError
from paceline.serve.api.app import create_app
from paceline.serve.api.keys import ApiKeys
from paceline.serve.engine import Engine

_DRAIN_S = 5


def listen(host: str, port: int, keys: ApiKeys) -> socket.socket:
    """Takes the address before the model is loaded, so that a mistake costs no time.

    Raises:
        UsageError: an address that others can reach, without keys.
        PacelineError: the address is taken, or cannot be.
    """
    if not keys and not _is_loopback(host):
        hint = "give --api-key-file, or listen on 127.0.0.1"
        raise UsageError(
            f"without keys a server listens on loopback only, not on {host}", hint=hint
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        hint = "another --port; 0 takes any that is free"
        raise PacelineError(f"cannot listen on {host} port {port}: {error}", hint=hint) from error
    return listener


def run(engine: Engine, listener: socket.socket, model_name: str, keys: ApiKeys) -> None:
    """Serves until SIGINT or SIGTERM; open answers have a few seconds to end.

    Raises:
        PacelineError: the engine failed.
    """
    app = create_app(engine, model_name, keys)
    config = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=_DRAIN_S, server_header=False
    )
    thread = threading.Thread(target=_serve, args=(engine,), name="engine")
    thread.start()
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        engine.stop()
        thread.join()


def _serve(engine: Engine) -> None:
    """The engine's thread; a failure has been logged, and health tells it."""
    try:
        engine.serve()
    except Exception:
        return


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
