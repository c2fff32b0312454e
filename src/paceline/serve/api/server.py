"""The server: an address, an engine on its own thread, and a way to stop."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import uvicorn

from paceline.core.errors import PacelineError, UsageError
from paceline.serve.api.app import create_app
from paceline.serve.api.keys import ApiKeys
from paceline.serve.engine import Engine

_DRAIN_S = 5
_ABORT_S = 5  # from the end of the draining to that of the connections, should a client not read


def listen(host: str, port: int, keys: ApiKeys) -> socket.socket:
    """Takes the address before the model is loaded, so that a mistake costs no time.

    Clients that come before `run` wait for it.

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
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # an address that is only bound can be taken by another server
    except OSError as error:
        listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


class EngineThread:
    """An engine that is loaded, and computes, on a thread of its own.

    On one and the same: OpenMP keeps a pool of threads for each thread that computes, and with two
    pools on the same cores neither waits awake, which makes small operations twice as slow.

    Args:
        load: gives the engine.

    Raises:
        Exception: what `load` raises.
    """

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._loaded: Future[Engine] = Future()
        # A daemon: an interrupt while it loads does not wait for it.
        self._thread = threading.Thread(target=self._run, args=(load,), name="engine", daemon=True)
        self._thread.start()
        self.engine = self._loaded.result()

    def stop(self) -> None:
        """Ends the engine after the step that it is in."""
        self.engine.stop()
        self._thread.join()

    def _run(self, load: Callable[[], Engine]) -> None:
        try:
            engine = load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(engine)
        with suppress(Exception):  # a failure has been logged, and health tells it
            engine.serve()


def run(thread: EngineThread, listener: socket.socket, model_name: str, keys: ApiKeys) -> None:
    """Serves until SIGINT or SIGTERM; open answers have a few seconds to end."""
    config = uvicorn.Config(
        create_app(thread.engine, model_name, keys),
        log_level="warning",
        timeout_graceful_shutdown=_DRAIN_S + _ABORT_S,
        server_header=False,
    )
    try:
        _Server(config, thread.engine).run(sockets=[listener])
    finally:
        thread.stop()


class _Server(uvicorn.Server):
    """Ends open answers itself once their time is up; uvicorn would do it with a traceback each."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(_DRAIN_S, self._engine.stop)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def _cannot_listen(host: str, port: int, error: OSError) -> PacelineError:
    hint = "another --port; 0 takes any that is free"
    return PacelineError(f"cannot listen on {host} port {port}: {error}", hint=hint)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
