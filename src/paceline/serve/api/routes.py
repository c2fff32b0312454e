"""The routes that answer: completions, chat, and the models that there are."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from paceline.core.errors import RequestError
from paceline.serve.api.answers import Answers, Handover, event_stream, whole_answer
from paceline.serve.api.schema import Asked, ChatBody, CompletionBody
from paceline.serve.api.shapes import ChatShape, CompletionShape, Envelope, Shape
from paceline.serve.api.token_routes import require_model
from paceline.serve.api.token_texts import TokenTexts
from paceline.serve.engine import Engine

_Body = ChatBody | CompletionBody


def answering(engine: Engine, model_name: str) -> APIRouter:
    """The routes around a running engine.

    Args:
        engine: answers.
        model_name: what clients call the model.
    """
    router = APIRouter(prefix="/v1")
    desk = _Desk(engine, model_name)
    started = int(time.time())

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        return await desk.complete(body, ChatShape(), http)

    @router.post("/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await desk.complete(body, CompletionShape(), http)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        card = {"id": model_name, "object": "model", "created": started, "owned_by": "paceline"}
        more = {"root": model_name, "parent": None, "max_model_len": engine.spec.max_positions}
        return {"object": "list", "data": [card | more]}

    return router


class _Desk:
    """Takes bodies to the engine and its answers back.

    Args:
        engine: answers.
        model_name: what clients call the model.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name
        self._texts = TokenTexts(engine.tokenizer)
        self._handover: Handover | None = None

    async def complete(self, body: _Body, shape: Shape, http: Request) -> Response:
        """The answer to a body: a stream, or the whole once it is there."""
        require_model(body.model, self._model_name)
        options = body.in_stream()
        answers = await self._begin(body, http)
        tells = body.logprobs is not None and body.logprobs is not False
        envelope = Envelope(shape, self._model_name, self._texts if tells else None)
        if body.stream:
            events = event_stream(answers, envelope, options)
            return StreamingResponse(events, media_type="text/event-stream")
        whole = await whole_answer(answers, envelope, http.receive)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    async def _begin(self, body: _Body, http: Request) -> Answers:
        try:
            # Long texts take a while to become tokens; the event loop has others to serve.
            asked = await run_in_threadpool(
                body.to_asked, self._engine.tokenizer, self._engine.spec
            )
            return Answers(self._engine, self._handover_here(), _by(asked, http))
        except RequestError as error:
            error.param = body.field_of(error.param)
            raise

    def _read(self, body: _Body) -> Asked:
        """What a body asks for, known to be answerable.

        Not the event loop's work: long texts take a while to become tokens, and so do grammars to
        be compiled.
        """
        asked = body.to_asked(self._engine.tokenizer, self._engine.spec)
        for request in asked.requests:
            self._engine.require(request)
        return asked

    def _handover_here(self) -> Handover:
        """What hands over to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._handover is None or self._handover.loop is not loop:
            self._handover = Handover(loop)
        return self._handover


def _by(asked: Asked, http: Request) -> Asked:
    """What is asked, by the tenant and within the time that stand in the request's state."""
    tenant = getattr(http.state, "tenant", "")
    return asked.of(tenant, getattr(http.state, "timeout_s", math.inf))
