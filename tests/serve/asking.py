"""A real server around an engine, for tests that speak HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from engines import TOKENIZER, _model, serving

from paceline.decode.grammar import Grammars
from paceline.decode.grammar_check import GrammarCheck
from paceline.serve.api.app import create_app
from paceline.serve.api.keys import ApiKeys
from paceline.serve.api.server import listen
from paceline.serve.engine import Engine
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.load import BLOCK_SIZE
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.stall_free import stall_free

NAME = "tiny"
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def grammar_engine() -> Engine:
    """A new engine around a tiny random model that can be held to grammars."""
    spec = _model().spec
    grammars = Grammars(TOKENIZER, spec.vocab_size)
    executor = LocalExecutor(_model(), 256, BLOCK_SIZE, grammars)
    check = GrammarCheck(grammars)
    return Engine(executor, stall_free, Budget(512, 8), spec, TOKENIZER, grammars=check)


@contextmanager
def live(engine: Engine, *, keys: Sequence[str] = ()) -> Generator[str]:
    """A server on a free port around an engine whose loop runs; gives its address."""
    listener = listen("127.0.0.1", 0, ApiKeys([]))
    app = create_app(engine, NAME, ApiKeys(list(keys)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    with serving(engine):
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            listener.close()
            assert not thread.is_alive()


def post(http: httpx.Client, path: str, **body: Any) -> httpx.Response:
    """Asks; ``...`` leaves a field out that is there otherwise."""
    base: dict[str, Any] = {"model": NAME, "max_tokens": 8}
    base |= {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    return http.post(path, json={k: v for k, v in (base | body).items() if v is not ...})


def answer(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """Asks for what there is an answer to."""
    response = post(http, path, **body)
    assert response.status_code == 200, response.text
    return response.json()


def chunks(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it should."""
    response = post(http, path, stream=True, **body)
    assert response.status_code == 200, response.text
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """An error, in OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error
