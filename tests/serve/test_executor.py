"""The executor of one process: what it keeps of a request, and that it forgets it."""

from __future__ import annotations

import pytest
from engines import GREEDY, encode, real_engine

from paceline.serve.executor.base import Work

pytestmark = pytest.mark.cpu

PROMPT = encode("hello there")


@pytest.fixture
def executor():
    return real_engine()._executor


def test_a_token_follows_only_where_one_is_asked_for(executor):
    parts = [Work(0, PROMPT[:4], 0, None), Work(0, PROMPT[4:], 4, GREEDY)]
    assert executor.run(parts[:1]).sampled == {}
    in_parts = executor.run(parts[1:]).sampled
    assert in_parts.keys() == {0}
    assert executor.run([Work(1, PROMPT, 0, GREEDY)]).sampled == {1: in_parts[0]}


def test_several_requests_in_one_step(executor):
    step = [Work(0, PROMPT, 0, GREEDY), Work(1, PROMPT[:5], 0, GREEDY), Work(2, (7,), 0, None)]
    sampled = executor.run(step).sampled
    assert sampled.keys() == {0, 1}
    for work in step[:2]:
        alone = Work(work.request_id + 10, work.tokens, 0, GREEDY)
        assert executor.run([alone]).sampled == {alone.request_id: sampled[work.request_id]}


def test_a_released_request_begins_anew(executor):
    first = executor.run([Work(0, PROMPT, 0, GREEDY)])
    with pytest.raises(AssertionError, match="the cache and the request disagree"):
        executor.run([Work(0, PROMPT, 0, GREEDY)])
    executor.release(0)
    assert executor.run([Work(0, PROMPT, 0, GREEDY)]) == first
    executor.release(12345)  # known or not
