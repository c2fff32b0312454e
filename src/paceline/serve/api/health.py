"""How the server is: alive, ready for more, and able to answer."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from paceline.core.errors import PacelineError
from paceline.decode.sampler import SamplingParams
from paceline.serve.api.door import Door, Refusal
from paceline.serve.api.guard import refused
from paceline.serve.engine import Engine
from paceline.serve.request import Delta, Request

DEEP_TIMEOUT_S = 10.0
"""In which a server in health generates a token, whatever else it does."""
_TENANT = "health"  # no digest of a key


def health(engine: Engine, door: Door) -> APIRouter:
    """The routes that tell it.

    Args:
        engine: answers.
        door: through which requests come.
    """
    router = APIRouter()
    is_probed = asyncio.Lock()

    @router.get("/health")
    async def alive() -> Response:
        """Whether the engine's thread lives; one that is mending itself does."""
        if not engine.is_healthy:
            return _told("the engine has stopped", 503)
        return _told("restarting" if engine.is_restarting else "ok", 200)

    @router.get("/ready")
    async def ready() -> Response:
        """Whether a request that comes now will be taken."""
        why = _why_not_ready(engine, door)
        return _told("ok", 200) if why is None else _told(why, 503)

    @router.get("/health/deep")
    async def deep() -> Response:
        """Whether a token is generated in time, through the queue; one such probe at a time."""
        if is_probed.locked():
            return refused(Refusal(429, "probe", "a probe runs", "rate_limit_error", 1))
        async with is_probed:
            why = await _why_no_token(engine)
        return _told("ok", 200) if why is None else _told(why, 503)

    return router


def _told(status: str, code: int) -> Response:
    body: dict[str, Any] = {"status": status}
    return JSONResponse(body, status_code=code, headers={"cache-control": "no-store"})


def _why_not_ready(engine: Engine, door: Door) -> str | None:
    if not engine.is_healthy:
        return "the engine has stopped"
    if engine.is_restarting:
        return "restarting"
    if door.is_shut:
        return "stopping"
    return None if door.has_room else "the queue is full"


async def _why_no_token(engine: Engine) -> str | None:
    """Why the engine gives no token; None if it does."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Delta] = loop.create_future()

    def end(delta: Delta) -> None:
        if not ended.done():
            ended.set_result(delta)

    def on_delta(delta: Delta) -> None:
        if delta.finish_reason is not None and not loop.is_closed():
            loop.call_soon_threadsafe(end, delta)

    request = Request(
        prompt_ids=(0,),
        sampling=SamplingParams(temperature=0),
        max_tokens=1,
        ignore_eos=True,
        tenant=_TENANT,
        timeout_s=DEEP_TIMEOUT_S,
    )
    try:
        number = engine.submit(request, on_delta)
    except PacelineError as error:
        return error.message
    try:
        async with asyncio.timeout(DEEP_TIMEOUT_S):
            delta = await ended
    except TimeoutError:
        return f"no token in {DEEP_TIMEOUT_S:g} s"
    finally:
        engine.cancel(number)
    return None if delta.token_ids else f"no token: {delta.finish_reason}"
