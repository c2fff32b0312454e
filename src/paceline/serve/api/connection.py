"""A client's connection: it has so long to send its request, and so long to read the answer."""

from __future__ import annotations

import asyncio
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from paceline.plan.plan import LimitsConfig

_TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)


def bounded(limits: LimitsConfig) -> type[H11Protocol]:
    """The protocol of connections within limits, for uvicorn to make."""

    class Bounded(BoundedConnection):
        bounds = limits

    return Bounded


class BoundedConnection(H11Protocol):
    """HTTP/1.1 within limits. Beyond them a connection ends; nobody else learns of it.

    An answer that its client does not read waits in the transport's buffer. Beyond a size its
    request stops giving more, and after a time the client is cut off, which cancels the request.
    """

    bounds = LimitsConfig()
    _is_late: asyncio.TimerHandle | None = None
    _is_unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=self.bounds.max_unread_bytes)
        if len(self.connections) > self.bounds.max_connections:
            self.transport.write(_TOO_MANY)
            self.transport.close()
        else:
            self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect_request()
        else:
            self._cancel_timers(unread=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timers(unread=True)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._expect_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._is_unread is None:
            wait_s = self.bounds.unread_timeout_s
            self._is_unread = self.loop.call_later(wait_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._is_unread is not None:
            self._is_unread.cancel()
            self._is_unread = None

    def _expect_request(self) -> None:
        """From the first of these calls on a request has its time to come whole."""
        if self._is_late is None and not self.transport.is_closing():
            wait_s = self.bounds.receive_timeout_s
            self._is_late = self.loop.call_later(wait_s, self._end_late)

    def _end_late(self) -> None:
        """The request has not come whole."""
        has_begun = self.conn.trailing_data[0] or self.conn.their_state is h11.SEND_BODY
        is_answered = self.cycle is not None and self.cycle.response_started
        if has_begun and (self.conn.their_state is h11.IDLE or not is_answered):
            self.transport.write(_TOO_SLOW)
        self.transport.close()

    def _cancel_timers(self, *, unread: bool) -> None:
        if self._is_late is not None:
            self._is_late.cancel()
            self._is_late = None
        if unread and self._is_unread is not None:
            self._is_unread.cancel()
            self._is_unread = None
