"""The HTTP application: routes, keys, limits, and errors in OpenAI's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import paceline
from paceline.core.errors import PacelineError, RequestError
from paceline.serve.api.answers import (
    AnswerStream,
    EngineFailedError,
    error_body,
    event_stream,
    request_error_body,
    whole_answer,
)
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.schema import ChatBody, CompletionBody
from paceline.serve.api.shapes import ChatShape, CompletionShape, Envelope, Shape
from paceline.serve.engine import Engine

MAX_BODY_BYTES = 4 << 20
_OPEN_PATHS = ("/health",)


def create_app(engine: Engine, model_name: str, keys: ApiKeys) -> FastAPI:
    """The application around a running engine.

    Args:
        engine: its `serve` runs on a thread of its own.
        model_name: what clients call the model.
        keys: who may ask.
    """
    app = FastAPI(title="Paceline", version=paceline.__version__, docs_url=None, redoc_url=None)
    started = int(time.time())

    async def complete(body: ChatBody | CompletionBody, shape: Shape, http: Request) -> Response:
        if body.model != model_name:
            message = f"no model {body.model!r}; this server has {model_name!r}"
            raise RequestError(message, param="model", status=404)
        with_usage = body.wants_usage()
        request = body.to_request(engine.tokenizer, engine.spec)
        try:
            stream = AnswerStream(engine, request)
        except RequestError as error:
            error.param = body.field_of(error.param)
            raise
        envelope = Envelope(shape, model_name)
        if body.stream:
            events = event_stream(stream, envelope, with_usage=with_usage)
            return StreamingResponse(events, media_type="text/event-stream")
        answer = await whole_answer(stream, envelope, http.is_disconnected)
        return Response(status_code=499) if answer is None else JSONResponse(answer)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        return await complete(body, ChatShape(), http)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await complete(body, CompletionShape(), http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": model_name, "object": "model", "created": started, "owned_by": "paceline"}
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> Response:
        is_healthy = engine.is_healthy
        status = {"status": "ok" if is_healthy else "the engine has stopped"}
        return JSONResponse(status, status_code=200 if is_healthy else 503)

    app.add_middleware(_Guard, keys=keys)
    _shape_errors(app)
    return app


class _Guard:
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


def _shape_errors(app: FastAPI) -> None:
    """Errors as OpenAI's clients expect them; nothing of ours leaks into a 500."""

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return JSONResponse(request_error_body(error), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        found = _most_telling(error.errors())
        where = [str(part) for part in found["loc"][1:] if not _is_type_name(part)]
        param = None if found["type"] == "json_invalid" else ".".join(where) or None
        message = f"{param or 'body'}: {_explain(found)}"
        body = error_body(message, kind="invalid_request_error", param=param)
        return JSONResponse(body, status_code=400)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        body = error_body(str(error.detail), kind="invalid_request_error")
        return JSONResponse(body, status_code=error.status_code)

    @app.exception_handler(PacelineError)
    @app.exception_handler(EngineFailedError)
    async def on_engine_failure(_: Request, error: Exception) -> Response:  # noqa: ARG001
        body = error_body("the engine stopped before the answer was done", kind="server_error")
        return JSONResponse(body, status_code=503)


def _most_telling(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the errors in the first field at fault, the one deepest inside it.

    A value that may be of two types has an error for each, one of them only that it is not the
    other.
    """
    field = errors[0]["loc"][1:2]
    there = [error for error in errors if error["loc"][1:2] == field]
    return max(there, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))


def _explain(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "this field is not built in this version"
    return str(error["msg"])


def _is_type_name(part: str | int) -> bool:
    """Whether a part of a location is pydantic's name of a union's member, not a field's."""
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str"))
