"""The HTTP application: routes, keys, limits, and errors in OpenAI's shape."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

import paceline
from paceline.serve.api.errors import shape_errors
from paceline.serve.api.guard import Guard
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.routes import answering
from paceline.serve.api.token_routes import tokenizing
from paceline.serve.engine import Engine


def create_app(engine: Engine, model_name: str, keys: ApiKeys) -> FastAPI:
    """The application around a running engine.

    Args:
        engine: its `serve` runs on a thread of its own.
        model_name: what clients call the model.
        keys: who may ask.
    """
    app = FastAPI(title="Paceline", version=paceline.__version__, docs_url=None, redoc_url=None)
    app.include_router(answering(engine, model_name))
    app.include_router(tokenizing(engine, model_name))

    @app.get("/health")
    async def health() -> Response:
        is_healthy = engine.is_healthy
        status = {"status": "ok" if is_healthy else "the engine has stopped"}
        return JSONResponse(status, status_code=200 if is_healthy else 503)

    app.add_middleware(Guard, keys=keys)
    shape_errors(app)
    return app
