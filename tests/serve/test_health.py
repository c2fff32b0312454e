"""Health that tells the truth, and a door that shuts in order."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from engines import Scripted, real_engine, scripted_engine
from servers import NAME, Gated, engine_around, live, require_balanced, wait_until

from paceline.serve.api import health
from paceline.serve.api.page import FILES
from paceline.serve.executor.base import ExecutorLostError

pytestmark = pytest.mark.cpu

BODY = {"model": NAME, "prompt": "hi", "max_tokens": 5, "temperature": 0}


def get(server, path, **headers):
    answer = httpx.get(f"{server.address}{path}", headers=headers, timeout=30)
    return answer.status_code, answer.json()["status"]


def ask(server, **more):
    return httpx.post(f"{server.address}/v1/completions", json=BODY | more, timeout=30)


def test_a_server_that_is_well():
    engine = real_engine()
    with live(engine) as server:
        for path in ("/health", "/ready", "/health/deep"):
            assert get(server, path) == (200, "ok")
        require_balanced(engine)


def test_an_engine_that_has_failed_is_told():
    with live(scripted_engine(Scripted(fail_at=2))) as server:
        assert get(server, "/health") == (200, "ok")
        assert ask(server).status_code == 503
        for path in ("/health", "/ready"):
            assert get(server, path) == (503, "the engine has stopped")
        assert get(server, "/health/deep")[0] == 503


def test_an_engine_whose_thread_has_ended_for_any_reason_is_told():
    """Not only a failure that is an `Exception` ends a thread."""

    class Leaving(Scripted):
        def run(self, step):
            super().run(step)
            raise SystemExit

    engine = scripted_engine(Leaving())

    def serve():
        with suppress(SystemExit):
            engine.serve()

    with live(engine, runs_engine=False) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        assert ask(server).status_code == 503
        thread.join()
        assert get(server, "/health") == (503, "the engine has stopped")
        assert ask(server).status_code == 503


def test_an_engine_that_mends_itself_is_alive_and_not_ready():
    class Lost(Scripted):
        restarting, mended = threading.Event(), threading.Event()

        def run(self, step):
            if not self.mended.is_set():
                raise ExecutorLostError("rank 1 was killed")
            return super().run(step)

        def restart(self):
            self.restarting.set()
            assert self.mended.wait(20)

    executor = Lost()
    with live(engine_around(executor)) as server:
        assert ask(server).status_code == 503
        assert executor.restarting.wait(10)
        assert get(server, "/health") == (200, "restarting")
        assert get(server, "/ready") == (503, "restarting")
        executor.mended.set()
        wait_until(lambda: get(server, "/ready") == (200, "ok"))
        assert ask(server).status_code == 200
        require_balanced(server.engine)


def test_deep_health_finds_an_engine_that_hangs(monkeypatch):
    monkeypatch.setattr(health, "DEEP_TIMEOUT_S", 0.2)
    gate = Gated()
    with live(engine_around(gate)) as server:
        assert get(server, "/health/deep") == (503, "no token in 0.2 s")
        assert get(server, "/health") == (200, "ok")
        gate.opened.set()
        assert get(server, "/health/deep") == (200, "ok")
        require_balanced(server.engine)


def test_one_probe_at_a_time():
    gate = Gated()
    with live(engine_around(gate)) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, server, "/health/deep")
        assert gate.entered.wait(10)
        second = httpx.get(f"{server.address}/health/deep")
        assert second.status_code == 429
        assert second.headers["retry-after"] == "1"
        gate.opened.set()
        assert first.result() == (200, "ok")


def test_only_health_and_the_page_need_no_key():
    with live(real_engine(), keys=["sk-one"]) as server:
        paths = {"/openapi.json", *FILES, *server.server.config.app.openapi()["paths"]}
        answers = {path: httpx.get(server.address + path).status_code for path in paths}
        assert {path for path, status in answers.items() if status != 401} == {"/health", *FILES}
        assert {"/metrics", "/ready", "/health/deep", "/v1/models"} <= answers.keys()
        assert get(server, "/ready", authorization="Bearer sk-one") == (200, "ok")


# The door


def test_a_server_that_is_told_to_stop_lets_open_answers_end():
    gate = Gated()
    with live(engine_around(gate)) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server)
        assert gate.entered.wait(10)
        server.server.handle_exit(signal.SIGTERM, None)
        assert get(server, "/ready") == (503, "stopping")
        assert get(server, "/health") == (200, "ok")
        refused = ask(server)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "20"
        gate.opened.set()
        assert answer.result().json()["choices"][0]["text"] == "aaaaa"
        wait_until(lambda: not server.server.started or not _listens(server))


def _listens(server):
    try:
        server.connect().close()
    except OSError:
        return False
    return True


def test_answers_that_do_not_end_in_time_are_ended():
    executor = Gated(step_s=0.01)
    executor.opened.set()
    with (
        live(engine_around(executor), drain_timeout_s=0.3) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(ask, server, max_tokens=50_000)
        assert executor.entered.wait(10)
        server.server.handle_exit(signal.SIGTERM, None)
        assert answer.result(timeout=20).status_code == 503


def test_a_second_signal_ends_at_once():
    executor = Gated(step_s=0.01)
    executor.opened.set()
    with (
        live(engine_around(executor), drain_timeout_s=1000.0) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        answer = pool.submit(ask, server, max_tokens=50_000)
        assert executor.entered.wait(10)
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        assert isinstance(answer.exception(timeout=20), httpx.HTTPError)
