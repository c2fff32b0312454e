"""The routes that answer: completions, chat, and the models that there are."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from paceline.core.errors import RequestError
from paceline.serve.adapters import adapter_named
from paceline.serve.api.answers import Answers, Handover, event_stream, whole_answer
from paceline.serve.api.asked import Asked
from paceline.serve.api.schema import ChatBody, CompletionBody
from paceline.serve.api.shapes import ChatShape, CompletionShape, Envelope, Shape
from paceline.serve.api.token_texts import TokenTexts
from paceline.serve.engine import Engine

_MAX_COMPILING = 2
_Body = ChatBody | CompletionBody


def answering(engine: Engine, model_name: str) -> APIRouter:
    """The routes around a running engine.

    Args:
        engine: answers.
        model_name: what clients call the model.
    """
    router = APIRouter(prefix="/v1")
    desk = _Desk(engine, model_name)

    @router.post("/chat/completions")
    async def chat_completions(body: ChatBody, http: Request) -> Response:
        return await desk.complete(body, ChatShape(), http)

    @router.post("/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        return await desk.complete(body, CompletionShape(), http)

    cards = model_cards(engine, model_name)

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(cards.values())}

    @router.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        adapter = adapter_named(name, model_name, engine.adapters)
        return cards[adapter or model_name]

    return router


def model_cards(engine: Engine, model_name: str) -> dict[str, dict[str, Any]]:
    """The model and its adapters by name, as clients list them."""
    created = int(time.time())
    return {
        name: {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "paceline",
            "root": model_name,
            "parent": None if name == model_name else model_name,
            "max_model_len": engine.spec.max_positions,
        }
        for name in (model_name, *sorted(engine.adapters))
    }


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
        self._compiling = asyncio.Semaphore(_MAX_COMPILING)

    async def complete(self, body: _Body, shape: Shape, http: Request) -> Response:
        """The answer to a body: a stream, or the whole once it is there."""
        adapter = adapter_named(body.model, self._model_name, self._engine.adapters)
        options = body.in_stream()
        answers = await self._begin(body, adapter, http)
        tells = body.logprobs is not None and body.logprobs is not False
        envelope = Envelope(shape, body.model, self._texts if tells else None)
        if body.stream:
            events = event_stream(answers, envelope, options)
            return StreamingResponse(events, media_type="text/event-stream")
        whole = await whole_answer(answers, envelope, http.receive)
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    async def _begin(self, body: _Body, adapter: str, http: Request) -> Answers:
        try:
            asked = await self._read(body)
            asked = asked.of(
                tenant=http.state.tenant, timeout_s=http.state.timeout_s, adapter=adapter
            )
            return Answers(self._engine, self._handover_here(), asked)
        except RequestError as error:
            error.param = body.field_of(error.param)
            raise

    async def _read(self, body: _Body) -> Asked:
        """What a body asks for, with a grammar that is known to be usable.

        Not the event loop's work: long texts take a while to become tokens. Grammars to be compiled
        wait for each other, lest they take all threads from those who have none.
        """
        tokenizer, spec = self._engine.tokenizer, self._engine.spec
        asked = await run_in_threadpool(body.to_asked, tokenizer, spec)
        if asked.requests[0].grammar is not None:
            async with self._compiling:
                await run_in_threadpool(self._engine.require, asked.requests[0])
        return asked

    def _handover_here(self) -> Handover:
        """What hands over to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._handover is None or self._handover.loop is not loop:
            self._handover = Handover(loop)
        return self._handover
