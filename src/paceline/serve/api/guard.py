"""What is refused before a body is read: wrong keys, and sizes that are too large."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from paceline.serve.api.errors import error_body
from paceline.serve.api.keys import ApiKeys

MAX_BODY_BYTES = 4 << 20
_OPEN_PATHS = ("/health",)


class Guard:
    """Keys and sizes, checked before a body is read.

    Plain ASGI: under Starlette's `BaseHTTPMiddleware` a route does not learn that its client has
    left.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, http: Request) -> Response | None:
        authorization = http.headers.get("authorization", "")
        if http.url.path not in _OPEN_PATHS and not self._keys.opens(authorization):
            body = error_body("wrong or missing API key", kind="authentication_error")
            return JSONResponse(body, status_code=401)
        if http.method != "POST":
            return None
        length = http.headers.get("content-length", "")
        if not length.isdecimal():
            body = error_body("a Content-Length is needed", kind="invalid_request_error")
            return JSONResponse(body, status_code=411)
        if int(length) > MAX_BODY_BYTES:
            message = f"a body may have {MAX_BODY_BYTES} bytes"
            body = error_body(message, kind="invalid_request_error")
            return JSONResponse(body, status_code=413)
        return None
