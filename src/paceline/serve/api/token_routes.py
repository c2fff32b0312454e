"""The routes that turn text into tokens and back, as vLLM's clients know them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.concurrency import run_in_threadpool

import paceline
from paceline.core.errors import RequestError
from paceline.serve.adapters import adapter_named
from paceline.serve.api.messages import Messages
from paceline.serve.api.prompts import TokenId
from paceline.serve.api.schema import chat_prompt_ids
from paceline.serve.api.strict import Strict
from paceline.serve.api.tools import Tools, tool_use
from paceline.serve.engine import Engine


class TokenizeBody(Strict):
    """``POST /tokenize``: a plain prompt, or a conversation as the model reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


def tokenizing(engine: Engine, model_name: str) -> APIRouter:
    """The routes around an engine's tokenizer.

    Args:
        engine: has the tokenizer.
        model_name: what clients call the model.
    """
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        adapter_named(body.model or model_name, model_name, engine.adapters)
        ids = await run_in_threadpool(_ids, body, engine)
        strings = [engine.tokenizer.backend.id_to_token(number) for number in ids]
        return {
            "count": len(ids),
            "max_model_len": engine.spec.max_positions,
            "tokens": ids,
            "token_strs": strings if body.return_token_strs else None,
        }

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        adapter_named(body.model or model_name, model_name, engine.adapters)
        if any(token >= engine.spec.vocab_size for token in body.tokens):
            message = f"token ids must be from 0 to {engine.spec.vocab_size - 1}"
            raise RequestError(message, param="tokens")
        decode = engine.tokenizer.backend.decode
        return {"prompt": decode(body.tokens, skip_special_tokens=False)}

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        tokenizer = engine.tokenizer
        ends = [tokenizer.backend.id_to_token(number) for number in tokenizer.eos_ids]
        template = {"chat_template": tokenizer.chat_template}
        return {"eos_token": ends[0] if ends else None, **tokenizer.special_tokens, **template}

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": paceline.__version__}

    return router


def _ids(body: TokenizeBody, engine: Engine) -> list[int]:
    """The tokens; a prompt has special ones unless refused, a template writes its own."""
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: give either a prompt or messages", param="prompt")
    if body.messages is None:
        for name in ("tools", "add_generation_prompt"):
            if getattr(body, name) is not None:
                raise RequestError(f"{name} goes with messages", param=name)
        is_special = body.add_special_tokens is not False
        return engine.tokenizer.encode(body.prompt or "", add_special_tokens=is_special)
    return chat_prompt_ids(
        engine.tokenizer,
        body.messages,
        tool_use(body.tools, None, None, engine.tokenizer),
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
    )
