"""``paceline serve`` as a process: answers, keys, mistakes at start, and ways to stop it."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

MODEL = "random:llama:tiny"
COMMAND = [sys.executable, "-m", "paceline", "serve"]


@contextmanager
def server(*arguments, model=MODEL):
    """A running server: its process and address."""
    command = [*COMMAND, model, "--port", "0", "--dtype", "float32", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            line = b""
            while not (found := re.search(rb"at (http://\S+)/v1", line)):
                line = process.stderr.readline()
                assert line, "the server ended before it served"
            yield process, found.group(1).decode()
        finally:
            process.kill()


def ask(address, **body):
    body = {"model": MODEL, "prompt": "hi", "max_tokens": 40} | body
    response = httpx.post(f"{address}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def stop(process, number):
    """Sends a signal; the exit code, the seconds it took, and what was said."""
    start_s = time.monotonic()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == b""
    assert b"Traceback" not in err
    return process.returncode, time.monotonic() - start_s, err.decode()


def test_an_answer_with_a_seed_survives_a_restart():
    with server() as (process, address):
        answer = ask(address, seed=11)
        assert ask(address, seed=12) != answer
        assert stop(process, signal.SIGTERM)[0] in (0, -signal.SIGTERM)
    with server("--set", "serve.max_batch_tokens=1") as (process, address):
        ask(address, prompt="something else first", seed=3)
        assert ask(address, seed=11) == answer
        assert stop(process, signal.SIGINT)[0] in (0, 130)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_stops_it_even_while_it_answers(number, code):
    """Open answers have `drain_timeout_s`; then they are cut, and told so."""
    body = {"model": "random:llama:small", "prompt": "hi", "max_tokens": 2000}
    streams = [[], [], [], []]

    def read(lines, address):
        options = {"json": body | {"stream": True, "temperature": 0}, "timeout": 60}
        with httpx.stream("POST", f"{address}/v1/completions", **options) as response:
            lines.extend(response.iter_lines())

    settings = ("--set", "serve.limits.drain_timeout_s=2")
    with server(*settings, model="random:llama:small") as (process, address):
        readers = [threading.Thread(target=read, args=(lines, address)) for lines in streams]
        for reader in readers:
            reader.start()
        time.sleep(1)
        assert httpx.get(f"{address}/health").status_code == 200
        found_code, seconds, err = stop(process, number)
        for reader in readers:
            reader.join()
    assert found_code == code
    assert seconds < 12
    assert err == ("error: interrupted\n" if number == signal.SIGINT else "")
    cut = [lines for lines in streams if "data: [DONE]" not in lines]
    assert cut != []
    for lines in cut:
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"


def test_keys_and_names(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("sk-test\n")
    arguments = ["--api-key-file", str(keys), "--served-model-name", "mine", "--host", "0.0.0.0"]
    with server(*arguments) as (_, address):
        address = address.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{address}/v1/models").status_code == 401
        headers = {"authorization": "Bearer sk-test"}
        models = httpx.get(f"{address}/v1/models", headers=headers)
        assert models.json()["data"][0]["id"] == "mine"
        assert httpx.get(f"{address}/health").status_code == 200


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def refused(*arguments):
    start_s = time.monotonic()
    command = [*COMMAND, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert time.monotonic() - start_s < 60
    return done.returncode, done.stderr


def test_a_port_in_use(taken_port):
    code, err = refused(MODEL, "--port", str(taken_port))
    assert code == 1
    assert f"cannot listen on 127.0.0.1 port {taken_port}: " in err
    assert "hint: another --port" in err


def test_strangers_need_keys():
    code, err = refused(MODEL, "--host", "0.0.0.0")
    assert code == 2
    assert "not on 0.0.0.0" in err
    assert "hint: give --api-key-file" in err


@pytest.mark.slow
def test_a_real_answer_with_a_seed_survives_a_restart():
    """SmolLM2, through OpenAI's client, in two processes, the second time after another request."""
    import openai

    def answer(address, seed):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            completion = client.chat.completions.create(
                model="smollm2-135m",
                messages=[{"role": "user", "content": "Tell me about a bicycle race."}],
                temperature=0.8,
                top_p=0.95,
                max_tokens=48,
                seed=seed,
            )
        return completion.choices[0].message.content

    with server(model="smollm2-135m") as (process, address):
        first = answer(address, 21)
        stop(process, signal.SIGTERM)
    with server(model="smollm2-135m") as (process, address):
        other = answer(address, 22)
        assert answer(address, 21) == first
        stop(process, signal.SIGTERM)
    assert len(first) > 20
    assert other != first
