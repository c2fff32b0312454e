"""Random lives of an engine over an oracle: what comes, goes, is cut off, and what must hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

from engines import TOKENIZER
from oracle import SPEC, Oracle, answer_alone, ask_ids

from paceline.core.clock import VirtualClock
from paceline.serve.engine import Engine
from paceline.serve.request import Delta, Request
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget, Policy

KEEP_ROOM = ("static", "temporal-fusion", "global-prefix")
"""Policies that admit who finds room to its end, and preempt nobody."""
PREFIX = (1, 2, 3, 1, 2, 3, 3, 2, 1, 1, 2, 2)

OPERATIONS = {"submit": 6, "step": 9, "cancel": 1, "fail": 1, "wait": 2, "lose": 0.3}
"""What may happen, and how often."""


class Heard:
    """What a request's receiver hears; it may cancel in the middle.

    Args:
        engine: that it hears from.
        request: that was asked.
        now_s: the time.
        cancel_at: after so many tokens; 0 never.
    """

    def __init__(self, engine: Engine, request: Request, now_s: float, cancel_at: int = 0) -> None:
        self._engine, self.request, self._cancel_at = engine, request, cancel_at
        self.deadline_s = now_s + request.timeout_s
        self.number = -1
        self.is_cancelled = False
        self.tokens: list[int] = []
        self.ends: list[str] = []

    def __call__(self, delta: Delta) -> None:
        assert not self.ends, "told something after the end"
        self.tokens += delta.token_ids
        if delta.finish_reason is not None:
            self.ends.append(delta.finish_reason)
        if self._cancel_at and len(self.tokens) == self._cancel_at:
            self.cancel()

    def cancel(self) -> None:
        """It is wanted no longer."""
        self._engine.cancel(self.number)
        self.is_cancelled = True

    def check(self) -> None:
        """What it heard is what the request alone gives, or a beginning of it."""
        whole = answer_alone(self.request)
        if self.ends and self.ends[0] in ("stop", "length"):
            assert tuple(self.tokens) == whole
        else:
            assert tuple(self.tokens) == whole[: len(self.tokens)]


class Life:
    """An engine, all that it was asked, and the checks of every step.

    Args:
        policy: that decides.
        num_blocks: of the pool.
        block_size: tokens to a block.
        budget: of a step.
    """

    def __init__(self, policy: Policy, num_blocks: int, block_size: int, budget: Budget) -> None:
        self.clock = VirtualClock()
        self.oracle = Oracle(num_blocks, block_size)
        self.engine = Engine(
            self.oracle, policy, budget, SPEC, TOKENIZER, clock=self.clock, adapters=["a"]
        )
        self.heard: list[Heard] = []
        self._room_tokens = num_blocks * block_size
        self._may_preempt = policy not in map(POLICIES.load, KEEP_ROOM)

    def submit(
        self,
        num_shared: int,
        rest: Sequence[int],
        max_tokens: int,
        *,
        tenant: str = "",
        adapter: str = "",
        stop_ids: tuple[int, ...] = (),
        timeout_s: float = float("inf"),
        cancel_at: int = 0,
    ) -> None:
        """Asks, for as much as the blocks hold."""
        prompt = (*PREFIX[:num_shared], *rest)[: self._room_tokens - 1] or (9,)
        request = ask_ids(
            prompt,
            min(max_tokens, self._room_tokens - len(prompt)),
            tenant=tenant,
            adapter=adapter,
            stop_ids=stop_ids,
            timeout_s=timeout_s,
        )
        heard = Heard(self.engine, request, self.clock.now_s(), cancel_at)
        heard.number = self.engine.submit(request, heard)
        self.oracle.expect(heard.number, request)
        self.heard.append(heard)

    def cancel(self, place: int) -> None:
        """Cancels one of all that were asked, ended or not."""
        if self.heard:
            self.heard[place % len(self.heard)].cancel()

    def fail(self, place: int) -> None:
        """One cannot be answered from now on."""
        if self.heard:
            self.oracle.fails.add(self.heard[place % len(self.heard)].number)

    def step(self) -> None:
        """One step of the engine, if there is anything to do, and all checks."""
        now_s = self.clock.now_s()
        ending = [heard for heard in self.heard if heard.is_cancelled or heard.deadline_s <= now_s]
        if self.engine.book or self.engine._arrived:
            self.engine.step()
        assert all(heard.ends for heard in ending), "it goes on, cancelled or late"
        self.check()

    def check(self) -> None:
        """Every block is in one state; every request is open or has ended, once."""
        book = self.engine.book
        book.kv.check()
        pool = book.kv.pool
        assert pool.num_free + pool.num_held == pool.num_blocks
        known = {state.id for state in book.open()}
        known |= {state.id for state in self.engine._arrived}
        if not self._may_preempt:
            assert book.num_preempted == 0, "room was promised and not kept"
        for heard in self.heard:
            assert (heard.number in known) != bool(heard.ends), "neither open nor ended, or both"
            if heard.number in book.running:
                assert book.kv.num_blocks(heard.number) > 0, "it runs without a block"

    def finish(self) -> None:
        """Every request ends, every answer is right, and no block is held."""
        most = 20 + 20 * sum(
            len(heard.request.prompt_ids) + heard.request.max_tokens for heard in self.heard
        )
        for _ in range(most):
            if not (self.engine.book or self.engine._arrived):
                break
            self.step()
        assert not self.engine.book, "a request starves"
        for heard in self.heard:
            assert len(heard.ends) == 1
            heard.check()
        assert self.engine.book.kv.pool.num_held == 0, "a block leaks"
        assert not self.engine.book.kv._coming, "what comes never came"


def live(seed: int, names: Sequence[str] = tuple(POLICIES), num_operations: int = 25) -> None:
    """A life that is a function of a seed."""
    dice = random.Random(seed)
    life = Life(
        POLICIES.load(dice.choice(names)),
        num_blocks=dice.randint(3, 14),
        block_size=dice.choice([1, 2, 4]),
        budget=Budget(dice.choice([1, 3, 8, 64]), dice.randint(1, 4)),
    )
    for _ in range(num_operations):
        match dice.choices(list(OPERATIONS), OPERATIONS.values())[0]:
            case "submit":
                life.submit(
                    dice.randint(0, 12),
                    dice.choices([1, 2, 3], k=dice.randint(0, 6)),
                    dice.randint(1, 9),
                    tenant=dice.choice(["", "a"]),
                    adapter=dice.choice(["", "", "a"]),
                    stop_ids=dice.choice([(), tuple(range(100, 110))]),
                    timeout_s=dice.choice([float("inf"), 2.0]),
                    cancel_at=dice.choice([0, 0, 1, 3]),
                )
            case "step":
                for _ in range(dice.randint(1, 4)):
                    life.step()
            case "cancel":
                life.cancel(dice.randint(0, 99))
            case "fail":
                life.fail(dice.randint(0, 99))
            case "wait":
                life.clock.sleep(1.0)
            case _:
                life.oracle.is_lost = True
                life.step()
                life.oracle.is_lost = False
    life.finish()
