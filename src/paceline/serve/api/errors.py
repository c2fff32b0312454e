"""Errors in OpenAI's shape; nothing of ours leaks into a 500."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from paceline.core.errors import PacelineError, RequestError
from paceline.serve.request import FinishReason

_TYPE_NAMES = ("str", "constrained-str", "constrained-list", "NamedTool")
_STOPPED = "the engine stopped before the answer was done"


class EngineFailedError(Exception):
    """The engine ended an answer before it was done.

    Args:
        reason: of the end, as the engine names it.
        message: what the engine says of it, if anything.
    """

    def __init__(self, reason: FinishReason, message: str = "") -> None:
        is_late = reason == "timeout"
        self.status = 504 if is_late else 503
        self.kind = "timeout_error" if is_late else "server_error"
        said = "the time for this request is up" if is_late else _STOPPED
        super().__init__(message or said)


def error_body(message: str, *, kind: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API shapes it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def request_error_body(error: RequestError) -> dict[str, Any]:
    """What a client is told of its mistake."""
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    return error_body(text, kind="invalid_request_error", param=error.param)


def failure_body(error: EngineFailedError) -> dict[str, Any]:
    """What a client is told of an answer that was not finished."""
    return error_body(str(error), kind=error.kind)


def shape_errors(app: FastAPI) -> None:
    """Errors as OpenAI's clients expect them; nothing of ours leaks into a 500."""

    @app.exception_handler(RequestError)
    async def on_request_error(_: Request, error: RequestError) -> Response:
        return JSONResponse(request_error_body(error), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        found = _most_telling(error.errors())
        where = [str(part) for part in found["loc"][1:] if not _is_type_name(part)]
        param = None if found["type"] == "json_invalid" else _sendable(".".join(where)) or None
        message = f"{param or 'body'}: {_sendable(_explain(found))}"
        body = error_body(message, kind="invalid_request_error", param=param)
        return JSONResponse(body, status_code=400)

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> Response:
        body = error_body(str(error.detail), kind="invalid_request_error")
        return JSONResponse(body, status_code=error.status_code)

    @app.exception_handler(EngineFailedError)
    async def on_failed_answer(_: Request, error: EngineFailedError) -> Response:
        return JSONResponse(failure_body(error), status_code=error.status)

    @app.exception_handler(PacelineError)
    async def on_stopped_engine(_: Request, error: PacelineError) -> Response:  # noqa: ARG001
        return JSONResponse(error_body(_STOPPED, kind="server_error"), status_code=503)


def _most_telling(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the errors in the first field at fault, the one deepest inside it.

    A value that may be of several types has errors for each. Those for which it is of another kind
    altogether do not tell.
    """
    field = errors[0]["loc"][1:2]
    by_type: dict[tuple[str | int, ...], list[dict[str, Any]]] = {}
    for error in errors:
        if error["loc"][1:2] == field:
            by_type.setdefault(_type_of(error["loc"]), []).append(error)
    meant = [found for name, found in by_type.items() if not _is_other_kind(found[0], name)]
    deepest = [max(found, key=_depth) for found in meant or by_type.values()]
    return max(deepest, key=_depth)


def _sendable(text: str) -> str:
    """A text of the client's, without halves of characters, which no answer can hold."""
    return text.encode(errors="replace").decode()


def _is_other_kind(error: dict[str, Any], type_name: tuple[str | int, ...]) -> bool:
    """Whether an error says that a value is not of a type at all, rather than what is in it."""
    return error["type"].endswith("_type") and tuple(error["loc"]) == type_name


def _depth(error: dict[str, Any]) -> int:
    return len(error["loc"])


def _type_of(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A location up to the first name of a union's member."""
    ends = (place + 1 for place, part in enumerate(location) if _is_type_name(part))
    return tuple(location[: next(ends, 0)])


def _explain(error: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "this field is not built in this version"
    return str(error["msg"]).removeprefix("Value error, ")


def _is_type_name(part: str | int) -> bool:
    """Whether a part of a location is pydantic's name of a union's member, not a field's."""
    return isinstance(part, str) and ("[" in part or part in _TYPE_NAMES)
