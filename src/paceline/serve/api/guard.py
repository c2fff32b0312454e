"""Stands before every route: who asks, how much may come, and what is told of what goes wrong."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.plan.plan import LimitsConfig
from paceline.serve.api.door import Door, Refusal
from paceline.serve.api.errors import error_body
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.page import FILES

MAX_BODY_BYTES = LimitsConfig().max_body_bytes
OPEN_PATHS = frozenset({"/health", *FILES})
"""What needs no key: whether the server lives, and a page that says nothing without one."""
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_log = logging.getLogger(__name__)


class Guard:
    """Keys and sizes, checked before a body is read; a name for every request.

    Puts into the state of a request whose it is (`tenant`), the time that it has (`timeout_s`) and
    its name (`request_id`). Plain ASGI: under Starlette's `BaseHTTPMiddleware` a route does not
    learn that its client has left.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, door: Door) -> None:
        self._app, self._keys, self._door = app, keys, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, secrets.token_hex(12))
        tenant = self._keys.tenant_of(Headers(scope=scope).get("authorization", ""))
        refusal = self._refusal(scope, tenant)
        if refusal is not None:
            self._door.refused[refusal.reason] += 1
            await refused(refusal)(scope, receive, answer.send)
            return
        given = {"tenant": tenant or "", "timeout_s": self._door.limits.request_timeout_s}
        scope.setdefault("state", {}).update(given, request_id=answer.name)
        await self._pass(scope, receive, answer, tenant or "")

    async def _pass(self, scope: Scope, receive: Receive, answer: _Answer, tenant: str) -> None:
        """Lets a request in; what fails inside is logged here, and nothing of it told."""
        is_work = scope["method"] == "POST"
        if is_work:
            self._door.enter(tenant)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            _log.exception("request %s failed", answer.name)
            if answer.has_begun:
                raise  # the connection is cut: the client must not take the part for the whole
            body = error_body(f"request {answer.name} failed", kind="server_error")
            await JSONResponse(body, status_code=500)(scope, receive, answer.send)
        finally:
            if is_work:
                self._door.leave(tenant)

    def _refusal(self, scope: Scope, tenant: str | None) -> Refusal | None:
        """Why a request does not come in."""
        headers = Headers(scope=scope)
        limits = self._door.limits
        size = len(scope["raw_path"]) + len(scope["query_string"])
        size += sum(len(name) + len(value) for name, value in scope["headers"])
        if len(scope["headers"]) > limits.max_headers or size > limits.max_header_bytes:
            most = f"{limits.max_headers} headers and {limits.max_header_bytes} bytes of them"
            return Refusal(431, "headers", f"a request may have {most}")
        if scope["path"] not in OPEN_PATHS and tenant is None:
            return Refusal(401, "unknown", "wrong or missing API key", "authentication_error")
        if not self._keys and is_foreign(headers):
            message = "a server without keys answers no pages of other sites"
            return Refusal(403, "foreign", message, "permission_error")
        if scope["method"] != "POST":
            return None
        return _size_refusal(headers, limits.max_body_bytes) or self._door.refusal(tenant or "")


class _Answer:
    """Sends an answer, with its name in a header.

    Args:
        send: of the server.
        name: of the request.
    """

    def __init__(self, send: Send, name: str) -> None:
        self._send, self.name, self.has_begun = send, name, False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.name
            headers["x-content-type-options"] = "nosniff"
            if message["status"] == 504:  # what took too long once will again
                headers["x-should-retry"] = "false"
        await self._send(message)
        if message.get("more_body"):  # else a fast stream never lets the loop see its client leave
            await asyncio.sleep(0)


def refused(refusal: Refusal) -> Response:
    """A refusal in OpenAI's shape."""
    body: dict[str, Any] = error_body(refusal.message, kind=refusal.kind)
    wait = {"retry-after": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
    return JSONResponse(body, status_code=refusal.status, headers=wait)


def is_foreign(headers: Headers) -> bool:
    """Whether a browser asks for a page of another site, or under another name than loopback's.

    A server without keys trusts whoever reaches it: any page that a user opens could, by its own
    name pointed at this machine as well.
    """
    host = _host_of(f"//{headers.get('host', '')}")
    if host is not None and host not in _LOOPBACK and not host.startswith("127."):
        return True
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")


def _host_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return ""


def _size_refusal(headers: Headers, max_bytes: int) -> Refusal | None:
    """A body's size must be known before it comes."""
    length = headers.get("content-length", "")
    if not length.isdecimal() or "transfer-encoding" in headers:
        return Refusal(411, "length", "a Content-Length is needed")
    if len(length) > 20 or int(length) > max_bytes:
        return Refusal(413, "body", f"a body may have {max_bytes} bytes")
    return None
