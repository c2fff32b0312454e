"""The engine with several steps under way: no request is in two, and what has to wait waits."""

from __future__ import annotations

from collections import deque

import pytest
from engines import SPEC, TOKENIZER, Listener, Scripted, ask, scripted_engine

from paceline.core.clock import VirtualClock
from paceline.serve.engine import Engine, join
from paceline.serve.executor.base import ExecutorLostError
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.stall_free import stall_free

pytestmark = pytest.mark.cpu


class Deep(Scripted):
    """Computes a step when its result is wanted; keeps who had a part of what was under way."""

    def __init__(self, depth: int, *, num_blocks: int = 1000, lost_at: int = 0) -> None:
        super().__init__()
        self.depth, self.num_blocks = depth, num_blocks
        self.under_way = deque()
        self.together = []
        self.restarts = 0
        self._lost_at = lost_at

    def submit(self, step):
        parts = [{work.request_id for work in other} for other in (*self.under_way, step)]
        assert sum(map(len, parts)) == len(set().union(*parts)), "a request is in two steps"
        assert len(self.under_way) < self.depth
        self.under_way.append(step)
        self.together.append(tuple(map(len, parts)))

    def collect(self):
        if len(self.steps) + 1 == self._lost_at:
            self._lost_at = 0
            self.under_way.clear()
            raise ExecutorLostError("rank 3 is gone", last_words="oh")
        return self.run(self.under_way.popleft())

    def release(self, request_id):
        assert all(work.request_id != request_id for step in self.under_way for work in step)
        super().release(request_id)

    def restart(self):
        self.restarts += 1


def engine_around(executor, *, max_sequences=8, max_batch_tokens=64):
    budget = Budget(max_batch_tokens, max_sequences)
    return Engine(executor, stall_free, budget, SPEC, TOKENIZER, clock=VirtualClock())


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_every_step_has_its_part_of_the_requests(depth, count):
    executor = Deep(depth)
    answers = engine_around(executor).generate([ask(max_tokens=9) for _ in range(count)])
    assert {answer.text for answer in answers} == {"a" * 9}
    seats = min(count, 8)
    part = -(-seats // depth)
    assert max(map(max, executor.together)) == part
    assert max(map(len, executor.together)) == -(-seats // part)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_preemption_takes_nothing_from_a_step_under_way(depth):
    executor = Deep(depth, num_blocks=12)
    engine = engine_around(executor)
    requests = [ask("x" * (20 + number), max_tokens=40) for number in range(6)]
    answers = engine.generate(requests)
    assert {answer.text for answer in answers} == {"a" * 40}
    assert engine.book.num_preempted > 0
    engine.book.kv.pool.check()
    assert engine.book.kv.pool.num_held == 0


def test_a_cancelled_request_ends_when_its_step_is_done():
    executor = Deep(2)
    engine = engine_around(executor)
    listeners = [Listener() for _ in range(4)]
    numbers = [engine.submit(ask(max_tokens=9), listener) for listener in listeners]
    engine.step()
    assert [state.is_busy for state in engine.book.open()] == [False, False, True, True]
    for number in numbers[1:3]:
        engine.cancel(number)
    engine.step()  # the one that is in no step ends at once
    assert [len(listener.deltas) for listener in listeners] == [1, 2, 1, 1]
    assert listeners[1].deltas[-1].finish_reason == "abort"
    assert listeners[2].deltas[-1].finish_reason is None
    engine.drain()
    assert [delta.finish_reason for delta in listeners[2].deltas] == [None, "abort"]
    assert join(listeners[0].deltas).text == join(listeners[3].deltas).text == "a" * 9
    assert engine.book.kv.pool.num_held == 0


def test_time_is_up_when_the_step_is_done():
    executor = Deep(2)
    engine = engine_around(executor)
    listeners = [Listener() for _ in range(2)]
    for listener, timeout_s in zip(listeners, (100.0, 1.0), strict=True):
        engine.submit(ask(max_tokens=9, timeout_s=timeout_s), listener)
    engine.step()
    engine._clock.sleep(2.0)
    engine.step()
    assert [delta.finish_reason for delta in listeners[1].deltas] == [None]
    engine.drain()
    assert [delta.finish_reason for delta in listeners[1].deltas] == [None, "timeout"]
    assert join(listeners[0].deltas).text == "a" * 9


def test_what_is_lost_takes_all_steps_under_way_with_it(caplog):
    executor = Deep(3, lost_at=4)
    engine = engine_around(executor)
    answers = engine.generate([ask(max_tokens=9) for _ in range(6)])
    assert {answer.finish_reason for answer in answers} == {"error"}
    assert executor.restarts == 1
    assert "rank 3 is gone; it is started again\noh" in caplog.text
    assert not engine.is_restarting
    assert engine.generate([ask(max_tokens=9)])[0].text == "a" * 9
    engine.book.kv.pool.check()
    assert engine.book.kv.pool.num_held == 0


def test_one_at_a_time_is_as_it_was():
    executor = Scripted()
    engine = scripted_engine(executor)
    assert engine.generate([ask(max_tokens=3)])[0].text == "aaa"
    assert len(executor.steps) == 3
