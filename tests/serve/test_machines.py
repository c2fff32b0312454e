"""Random operations on the pool, on the owner of blocks, and on whole engines under every policy.

The engine's executor is an oracle: it compares every key that is read with the right one.
"""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from machine import Life, live

from paceline.serve.kv.owner import KVOwner, extend, root
from paceline.serve.kv.pool import BlockPool, Key
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget

pytestmark = pytest.mark.cpu

NUM_SEQUENCES = 10_000  # of operations; a quick run does a twentieth


class Pool(RuleBasedStateMachine):
    """A pool beside a list of what each holder holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.held: list[int] = []
        self.contents: dict[int, bytes] = {}  # of named blocks that were not taken anew

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def take(self) -> None:
        block = self.pool.take()
        assert block not in self.held
        self.held.append(block)
        self.contents.pop(block, None)

    @precondition(lambda self: self.held)
    @rule(place=st.integers(0, 99), content=st.integers(0, 9))
    def name(self, place: int, content: int) -> None:
        block, key = self.held[place % len(self.held)], Key(bytes([content]))
        is_news = block not in self.contents and key not in self.contents.values()
        self.pool.name(block, key)
        if is_news:
            self.contents[block] = key

    @rule(content=st.integers(0, 9))
    def hold(self, content: int) -> None:
        block = self.pool.find(Key(bytes([content])))
        if block is not None:
            self.pool.hold(block)
            self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(place=st.integers(0, 99))
    def drop(self, place: int) -> None:
        self.pool.drop([self.held.pop(place % len(self.held))])

    @invariant()
    def agrees(self) -> None:
        self.pool.check()
        assert self.pool.num_held == len(set(self.held))
        assert self.pool.num_free == 6 - self.pool.num_held
        for block in set(self.held):
            assert self.pool.num_holders(block) == self.held.count(block)
        for content in range(10):
            key = Key(bytes([content]))
            expected = next((b for b, known in self.contents.items() if known == key), None)
            assert self.pool.find(key) == expected


class Owner(RuleBasedStateMachine):
    """Tables beside the contents that each request has written to its blocks."""

    SIZE = 2

    def __init__(self) -> None:
        super().__init__()
        self.owner = KVOwner(8, self.SIZE)
        self.numbers = count()
        self.open: dict[int, tuple[list[int], list[Key], int, list[int]]] = {}
        self.written: dict[int, tuple[str, tuple[int, ...]]] = {}  # block to tenant and prefix
        self.tenants: dict[int, str] = {}

    @rule(
        tenant=st.sampled_from(["", "a"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
    )
    def begin(self, tenant: str, tokens: list[int]) -> None:
        keys: list[Key] = []
        extend(keys, root(tenant, ""), tokens, self.SIZE)
        number = next(self.numbers)
        found = self.owner.begin(number, keys, (len(tokens) - 1) // self.SIZE)
        for index, block in enumerate(found):
            prefix = tuple(tokens[: (index + 1) * self.SIZE])
            assert self.written[block] == (tenant, prefix), "it finds what is not its own"
        self.open[number] = (tokens, keys, len(found) * self.SIZE, list(found))
        self.tenants[number] = tenant

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, 99), num_tokens=st.integers(1, 4))
    def compute(self, place: int, num_tokens: int) -> None:
        number = list(self.open)[place % len(self.open)]
        tokens, keys, done, table = self.open[number]
        end = min(len(tokens), done + num_tokens)
        if -(-end // self.SIZE) - len(table) > self.owner.pool.num_free:
            return
        table += self.owner.reserve(number, end)
        for index in range(done // self.SIZE, len(table)):
            prefix = tuple(tokens[: min(end, (index + 1) * self.SIZE)])
            self.written[table[index]] = (self.tenants[number], prefix)
        self.owner.commit(number, keys, end)
        self.open[number] = (tokens, keys, end, table)

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, 99))
    def release(self, place: int) -> None:
        number = list(self.open)[place % len(self.open)]
        del self.open[number]
        self.owner.release(number)

    @invariant()
    def agrees(self) -> None:
        self.owner.check()
        for number, (tokens, keys, done, table) in self.open.items():
            assert self.owner.num_blocks(number) == len(table)
            for index in range(done // self.SIZE):
                prefix = tuple(tokens[: (index + 1) * self.SIZE])
                assert self.written[table[index]] == (self.tenants[number], prefix)
                assert self.owner.computing(keys[index]) != number, "it is computed already"


class Serving(RuleBasedStateMachine):
    """A whole engine."""

    policies: tuple[str, ...] = tuple(POLICIES)

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        draw = data.draw
        self.life = Life(
            POLICIES.load(draw(st.sampled_from(self.policies))),
            num_blocks=draw(st.integers(3, 14)),
            block_size=draw(st.sampled_from([1, 2, 4])),
            budget=Budget(draw(st.sampled_from([1, 3, 8, 64])), draw(st.integers(1, 4))),
        )

    @rule(
        num_shared=st.integers(0, 12),
        rest=st.lists(st.integers(1, 3), max_size=6),
        max_tokens=st.integers(1, 9),
        tenant=st.sampled_from(["", "a"]),
        adapter=st.sampled_from(["", "", "a"]),
        stop_ids=st.sampled_from([(), tuple(range(100, 110))]),
        timeout_s=st.sampled_from([float("inf"), 2.0]),
        cancel_at=st.sampled_from([0, 0, 1, 3]),
    )
    def submit(self, **asked) -> None:
        self.life.submit(**asked)

    @rule(place=st.integers(0, 99))
    def cancel(self, place: int) -> None:
        self.life.cancel(place)

    @rule(place=st.integers(0, 99))
    def fail(self, place: int) -> None:
        self.life.fail(place)

    @rule()
    def wait(self) -> None:
        self.life.clock.sleep(1.0)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.life.step()

    @rule()
    def lose(self) -> None:
        self.life.oracle.is_lost = True
        self.life.step()
        self.life.oracle.is_lost = False

    def teardown(self) -> None:
        if hasattr(self, "life"):
            self.life.finish()


def prove(machine: type[RuleBasedStateMachine], num_sequences: int, num_steps: int = 25) -> None:
    """Runs random sequences of operations."""
    how = settings(
        max_examples=num_sequences,
        stateful_step_count=num_steps,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=how)


@pytest.mark.parametrize("machine", [Pool, Owner])
def test_blocks(machine):
    prove(machine, NUM_SEQUENCES // 100)


@pytest.mark.parametrize("name", POLICIES)
def test_engines(name):
    machine = type("Serving", (Serving,), {"policies": (name,)})
    prove(machine, NUM_SEQUENCES // 20 // len(POLICIES))


TENTHS = [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, 10))]


@pytest.mark.parametrize("tenth", TENTHS)
def test_ten_thousand_lives(tenth):
    """Each a function of its seed: what is submitted, cancelled, failed, lost and late."""
    for seed in range(tenth * NUM_SEQUENCES // 10, (tenth + 1) * NUM_SEQUENCES // 10):
        live(seed)


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Pool, Owner, Serving])
def test_ten_thousand_sequences_that_seek_a_fault(machine):
    prove(machine, NUM_SEQUENCES)
