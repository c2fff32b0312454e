"""The executor of one process: what it keeps of a request, and that it forgets it."""

from __future__ import annotations

import pytest
from engines import GREEDY, encode, real_engine

from paceline.decode.sampler import Draw
from paceline.serve.executor.base import Work

pytestmark = pytest.mark.cpu

PROMPT = encode("hello there, all of you out there")
END = Draw(GREEDY, len(PROMPT))


@pytest.fixture
def executor():
    return real_engine()._executor


def test_a_token_follows_only_where_one_is_asked_for(executor):
    parts = [Work(0, PROMPT[:4], 0, (3,), None), Work(0, PROMPT[4:], 4, (7, 1), END)]
    assert executor.run(parts[:1]).sampled == {}
    in_parts = executor.run(parts[1:]).sampled
    assert in_parts.keys() == {0}
    assert executor.run([Work(1, PROMPT, 0, (2, 4, 5), END)]).sampled == {1: in_parts[0]}


def test_several_requests_in_one_step(executor):
    step = [
        Work(0, PROMPT, 0, (0, 1, 2), END),
        Work(1, PROMPT[:5], 0, (3,), Draw(GREEDY, 5)),
        Work(2, (7,), 0, (4,), None),
    ]
    sampled = executor.run(step).sampled
    assert sampled.keys() == {0, 1}
    for work in step[:2]:
        number = work.request_id + 10
        alone = Work(number, work.tokens, 0, (10, 11, 12), work.draw)
        assert executor.run([alone]).sampled == {number: sampled[work.request_id]}
        executor.release(number)


def test_a_released_request_begins_anew(executor):
    first = executor.run([Work(0, PROMPT, 0, (0, 1, 2), END)])
    executor.release(0)
    with pytest.raises(AssertionError, match="the table and the request disagree"):
        executor.run([Work(0, PROMPT, 0, (0, 1), END)])
    executor.release(0)
    assert executor.run([Work(0, PROMPT, 0, (5, 6, 7), END)]) == first
    executor.release(12345)  # known or not


def test_blocks_that_others_have_filled_are_read(executor):
    """A request that finds its first blocks computes the rest alone."""
    whole = executor.run([Work(0, PROMPT, 0, (4, 2, 9), END)]).sampled[0]
    rest = Work(1, PROMPT[32:], 32, (4, 2, 8), END)
    assert executor.run([rest]).sampled == {1: whole}
