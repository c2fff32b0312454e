"""The HTTP application: routes, keys, limits, and errors in OpenAI's shape."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import Response

import paceline
from paceline.plan.plan import LimitsConfig
from paceline.serve.adapters import require_names_apart
from paceline.serve.api.door import Door, queue_is_full
from paceline.serve.api.errors import shape_errors
from paceline.serve.api.guard import Guard, refused
from paceline.serve.api.health import health
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.metrics import metrics
from paceline.serve.api.page import page
from paceline.serve.api.routes import answering
from paceline.serve.api.token_routes import tokenizing
from paceline.serve.engine import Engine
from paceline.serve.queue_cap import QueueFullError
from paceline.serve.tally import Tally


def create_app(engine: Engine, model_name: str, keys: ApiKeys, door: Door | None = None) -> FastAPI:
    """The application around an engine, whose queue it limits and whose steps it counts.

    Args:
        engine: its `serve` runs on a thread of its own.
        model_name: what clients call the model.
        keys: who may ask.
        door: who may come in; with the usual limits unless given.

    Raises:
        UsageError: an adapter has the model's name.
    """
    require_names_apart(model_name, engine.adapters)
    door = door or Door(engine, LimitsConfig())
    tally = Tally(engine.spec, engine.dtype)
    engine.observe(tally)
    app = FastAPI(title="Paceline", version=paceline.__version__, docs_url=None, redoc_url=None)
    app.include_router(answering(engine, model_name))
    app.include_router(tokenizing(engine, model_name))
    app.include_router(health(engine, door))
    app.include_router(metrics(engine, door, tally, model_name))
    app.include_router(page())

    @app.exception_handler(QueueFullError)
    async def on_full_queue(*_: Request | Exception) -> Response:
        refusal = queue_is_full()
        door.refused[refusal.reason] += 1
        return refused(refusal)

    app.add_middleware(Guard, keys=keys, door=door)
    shape_errors(app)
    return app
