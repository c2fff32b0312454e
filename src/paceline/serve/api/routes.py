"""The routes that answer: completions, chat, and the models that there are."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from paceline.core.errors import RequestError
from paceline.serve.api.answers import AnswerStream, event_stream, whole_answer
from paceline.serve.api.schema import ChatBody, CompletionBody
from paceline.serve.api.shapes import ChatShape, CompletionShape, Envelope, Shape
from paceline.serve.engine import Engine


def answering(engine: Engine, model_name: str) -> APIRouter:
    """The routes around a running engine.

    Args:
        engine: answers.
        model_name: what clients call the model.
    """
    router = APIRouter(prefix="/v1")
    started = int(time.time())

    async def complete(body: ChatBody | CompletionBody, shape: Shape, http: Request) -> Response:
        if body.model != model_name:
            message = f"no model {body.model!r}; this server has {model_name!r}"
            raise RequestError(message, param="model", status=404)
        with_usage = body.wants_usage()
        request = body.to_request(engine.tokenizer, engine.spec)
        request = replace(request, tenant=http.state.tenant, timeout_s=http.state.timeout_s)
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

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        return await complete(body, ChatShape(), http)

    @router.post("/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await complete(body, CompletionShape(), http)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        card = {"id": model_name, "object": "model", "created": started, "owned_by": "paceline"}
        return {"object": "list", "data": [card]}

    return router
