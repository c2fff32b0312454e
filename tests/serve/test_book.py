"""What a step reads of those who wait: no more than it admits and one, however many they are."""

from __future__ import annotations

import pytest
from oracle import ask_ids, oracle_engine

from paceline.serve.book import Book
from paceline.serve.schedule import POLICIES

pytestmark = pytest.mark.cpu

NUM_WAITING = 2000


@pytest.fixture
def seen(monkeypatch) -> list[int]:
    """Ids of the waiting requests that were looked at."""
    found: list[int] = []
    original = Book._waiting_view

    def waiting_view(self, state, *arguments):
        found.append(state.id)
        return original(self, state, *arguments)

    monkeypatch.setattr(Book, "_waiting_view", waiting_view)
    return found


def submit(engine, oracle, prompts, max_tokens=4) -> list[int]:
    numbers: list[int] = []
    for prompt in prompts:
        request = ask_ids(prompt, max_tokens)
        numbers.append(engine.submit(request, lambda _delta: None))
        oracle.expect(numbers[-1], request)
    return numbers


@pytest.mark.parametrize("name", POLICIES)
def test_nobody_is_looked_at_where_no_seat_is_free(name, seen):
    engine, oracle = oracle_engine(POLICIES.load(name), max_sequences=1)
    submit(engine, oracle, [[1] * 9, *([2] * 9 for _ in range(NUM_WAITING))], max_tokens=20)
    engine.step()
    seen.clear()
    for _ in range(10):
        engine.step()
    assert seen == []


@pytest.mark.parametrize("name", ["stall-free", "prefill-first", "temporal-fusion"])
def test_few_are_looked_at_that_wait_for_the_block_of_another(name, seen):
    engine, oracle = oracle_engine(POLICIES.load(name), max_sequences=4, max_batch_tokens=4)
    submit(engine, oracle, [[1] * 40 for _ in range(NUM_WAITING)])
    engine.step()
    assert len(engine.book.running) == 1
    seen.clear()
    engine.step()
    assert len(seen) <= 5


@pytest.mark.parametrize("name", ["stall-free", "prefill-first", "temporal-fusion"])
def test_one_that_shares_waits_until_it_finds(name):
    """So that nothing is computed twice; others pass it."""
    engine, oracle = oracle_engine(POLICIES.load(name), max_batch_tokens=64)
    shared = [1] * 12
    first, twin, other = submit(engine, oracle, [[*shared, 2], [*shared, 3], [5, 5]])
    engine.step()
    assert set(engine.book.running) == {first, other}
    engine.step()
    assert twin in engine.book.running
    assert oracle.num_computed == 13 + 1 + 2


def test_one_that_shares_goes_on_when_the_other_is_cancelled():
    engine, oracle = oracle_engine(POLICIES.load("stall-free"), max_batch_tokens=4)
    first, twin = submit(engine, oracle, [[1] * 12, [1] * 13])
    engine.step()
    assert set(engine.book.running) == {first}
    engine.cancel(first)
    engine.step()
    assert set(engine.book.running) == {twin}
    assert engine.book.num_found_tokens == 4
    engine.drain()


def test_deadlines_are_told_once_and_in_order():
    engine, oracle = oracle_engine(POLICIES.load("serial"))
    book = engine.book
    for timeout_s in (3.0, 1.0, float("inf"), 2.0):
        request = ask_ids([1], timeout_s=timeout_s)
        oracle.expect(engine.submit(request, lambda _delta: None), request)
    book.add(engine._arrived)
    assert book.late(0.5) == []
    book.end(3)
    assert book.late(2.0) == [1]
    assert book.late(2.0) == []
    assert book.late(3.0) == [0]
