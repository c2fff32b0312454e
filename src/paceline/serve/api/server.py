"""The server: an address, an engine on its own thread, and a way to stop."""

from __future__ import annotations

import ipaddress
import resource
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from types import FrameType

import uvicorn

from paceline.core.errors import PacelineError, UsageError
from paceline.plan.plan import LimitsConfig
from paceline.serve.api.app import create_app
from paceline.serve.api.connection import bounded
from paceline.serve.api.door import Door
from paceline.serve.api.keys import ApiKeys
from paceline.serve.engine import Engine

_ABORT_S = 5  # from the end of the draining to that of the connections, should a client not read
_BACKLOG = 1024  # of clients that have come and are not yet let in
_OTHER_FILES = 256


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
        listener.listen(_BACKLOG)  # an address that is only bound can be taken by another server
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


def run(
    thread: EngineThread,
    listener: socket.socket,
    model_name: str,
    keys: ApiKeys,
    limits: LimitsConfig,
) -> None:
    """Serves until SIGINT or SIGTERM; open answers have some time to end, unless a second comes."""
    _allow_files(limits.max_connections + _OTHER_FILES)
    try:
        server_around(thread.engine, model_name, keys, limits).run(sockets=[listener])
    finally:
        thread.stop()


def server_around(
    engine: Engine, model_name: str, keys: ApiKeys, limits: LimitsConfig
) -> uvicorn.Server:
    """The HTTP server of an engine, which is to run already or soon."""
    door = Door(engine, limits)
    config = uvicorn.Config(
        create_app(engine, model_name, keys, door),
        loop="asyncio",
        http=bounded(limits),
        ws="none",
        h11_max_incomplete_event_size=limits.max_header_bytes,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=_ABORT_S,
        server_header=False,
    )
    return _Server(config, engine, door)


class _Server(uvicorn.Server):
    """Drains before it shuts down: it listens on, to tell who comes that it stops.

    uvicorn would close its socket first, and end open answers with a traceback each.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, door: Door) -> None:
        super().__init__(config)
        self._engine, self._door = engine, door

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._door.is_shut:
            self.force_exit = True
        else:
            self._door.shut()
            self.should_exit = False  # but `on_tick` says when

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._door.is_drained

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._engine.stop()  # whoever is still here is told
        if self.force_exit:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        await super().shutdown(sockets)


def _allow_files(number: int) -> None:
    """Asks for so many open files, or as many as there may be: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number if hard == resource.RLIM_INFINITY else min(number, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
