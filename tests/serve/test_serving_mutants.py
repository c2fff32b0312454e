"""Deliberate defects in scheduling and in the blocks, each of which a random life shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from machine import live
from oracle import Oracle
from test_global_prefix import test_a_job_computes_what_its_tree_of_prefixes_requires as fewest
from test_owner import test_nothing_is_found_beyond_a_gap as gap
from test_policies import test_every_step_keeps_the_contract as contract

from paceline.serve import engine as engine_module
from paceline.serve.book import Book
from paceline.serve.engine import Engine
from paceline.serve.kv import owner as owner_module
from paceline.serve.kv.owner import KVOwner, root
from paceline.serve.kv.pool import BlockPool
from paceline.serve.schedule.base import RequestView
from paceline.serve.schedule.global_prefix import GlobalPrefix
from paceline.serve.schedule.room import Room

pytestmark = pytest.mark.cpu

NUM_LIVES = 400
Patch = pytest.MonkeyPatch
Mutant = Callable[[Patch], None]


def lives() -> None:
    """Nothing breaks, and every answer is right."""
    for seed in range(NUM_LIVES):
        live(seed)


PROOFS = {
    "lives": lives,
    "fewest": fewest,  # no job computes more than it must
    "gap": gap,
    "contract": lambda: contract(name="stall-free"),
}
MUTANTS: list[tuple[Mutant, str]] = []


def mutant(mutate: Mutant) -> Mutant:
    """A defect that random lives show."""
    MUTANTS.append((mutate, "lives"))
    return mutate


def shown_by(proof: str) -> Callable[[Mutant], Mutant]:
    """A defect that another proof shows: it is too rare for lives, or costs time alone."""

    def add(mutate: Mutant) -> Mutant:
        MUTANTS.append((mutate, proof))
        return mutate

    return add


# The pool


@mutant
def block_leaked_at_release(patch: Patch) -> None:
    original = BlockPool.drop
    patch.setattr(BlockPool, "drop", lambda self, blocks: original(self, blocks[:-1]))


@mutant
def block_dropped_twice(patch: Patch) -> None:
    original = BlockPool.drop
    patch.setattr(BlockPool, "drop", lambda self, blocks: original(self, [*blocks, *blocks[:1]]))


@mutant
def evicted_block_keeps_its_name(patch: Patch) -> None:
    original = BlockPool._evict

    def evict(self: BlockPool) -> int:
        names = dict(self._blocks)
        block = original(self)
        self._blocks = names
        return block

    patch.setattr(BlockPool, "_evict", evict)


@mutant
def held_block_stays_in_the_cache(patch: Patch) -> None:
    def hold(self: BlockPool, block: int) -> None:
        self._num_holders[block] += 1

    patch.setattr(BlockPool, "hold", hold)


@mutant
def block_shared_and_not_held(patch: Patch) -> None:
    patch.setattr(BlockPool, "hold", lambda _self, _block: None)


# Names


@mutant
def name_given_before_the_tokens_are_computed(patch: Patch) -> None:
    original = KVOwner.commit

    def commit(self: KVOwner, request_id: int, keys: list, num_tokens: int) -> None:  # noqa: ARG001
        room = self.num_blocks(request_id) * self.block_size
        original(self, request_id, keys, room)

    patch.setattr(KVOwner, "commit", commit)


@mutant
def root_without_the_tenant(patch: Patch) -> None:
    patch.setattr(engine_module, "root", lambda _tenant, adapter: root("", adapter))


@mutant
def root_without_the_adapter(patch: Patch) -> None:
    patch.setattr(engine_module, "root", lambda tenant, _adapter: root(tenant, ""))


@mutant
def name_without_what_comes_before(patch: Patch) -> None:
    original = owner_module.extend

    def extend(keys: list, first, tokens, block_size: int) -> None:
        for index in range(len(keys), len(tokens) // block_size):
            own: list = []
            original(own, first, tokens[index * block_size :][:block_size], block_size)
            keys.extend(own)

    patch.setattr("paceline.serve.book.extend", extend)


@mutant
def names_of_tokens_that_changed(patch: Patch) -> None:
    """The last token of a block does not count."""
    original = owner_module.extend

    def extend(keys: list, first, tokens, block_size: int) -> None:
        last = block_size - 1
        blind = [0 if place % block_size == last else token for place, token in enumerate(tokens)]
        original(keys, first, blind, block_size)

    patch.setattr("paceline.serve.book.extend", extend)


# Tables


@mutant
def one_block_too_many_found(patch: Patch) -> None:
    patch.setattr(Book, "_most_found", lambda self, state: len(state.tokens) // self.kv.block_size)


@shown_by("gap")
def found_beyond_a_gap(patch: Patch) -> None:
    def found(self: KVOwner, keys) -> list[int]:
        blocks = [self.pool.find(key) for key in keys]
        return [block for block in blocks if block is not None]

    patch.setattr(KVOwner, "found", found)


@mutant
def own_blocks_counted_once_for_all(patch: Patch) -> None:
    """A block stays its first holder's own when another holds it too."""
    original = KVOwner._add

    def add(self: KVOwner, block: int, table, request_id: int) -> None:
        before = {number: of_one.num_own for number, of_one in self._tables.items()}
        original(self, block, table, request_id)
        for number, num_own in before.items():
            self._tables[number].num_own = max(num_own, self._tables[number].num_own)

    patch.setattr(KVOwner, "_add", add)


@mutant
def coming_key_never_taken_back(patch: Patch) -> None:
    original = KVOwner.release

    def release(self: KVOwner, request_id: int) -> None:
        coming = dict(self._coming)
        original(self, request_id)
        self._coming = coming

    patch.setattr(KVOwner, "release", release)
    patch.setattr(KVOwner, "check", lambda _self: None)  # a life that never ends shows it too


@mutant
def names_kept_when_the_executor_is_lost(patch: Patch) -> None:
    patch.setattr(Book, "forget_blocks", lambda _self: None)


# Requests


@mutant
def preempted_and_num_computed_kept(patch: Patch) -> None:
    original = Book.preempt

    def preempt(self: Book, request_id: int) -> None:
        num_computed = self.running[request_id].num_computed
        original(self, request_id)
        self.waiting[request_id].num_computed = num_computed

    def work(self: Book, share, now_s):
        """Does not set it when the request is admitted anew."""
        state = self.waiting.get(share.request_id)
        before = state.num_computed if state else 0
        found = original_work(self, share, now_s)
        if before:
            self.running[share.request_id].num_computed = before
            found = replace(found, start=before)
        return found

    original_work = Book.work
    patch.setattr(Book, "preempt", preempt)
    patch.setattr(Book, "work", work)


@mutant
def preempted_and_blocks_kept(patch: Patch) -> None:
    original, release = Book.preempt, KVOwner.release

    def preempt(self: Book, request_id: int) -> None:
        patch.setattr(KVOwner, "release", lambda *_: None)
        original(self, request_id)
        patch.setattr(KVOwner, "release", release)

    patch.setattr(Book, "preempt", preempt)


@mutant
def ended_and_blocks_kept(patch: Patch) -> None:
    def end(self: Book, request_id: int):
        mine = self.running if request_id in self.running else self.waiting
        return mine.pop(request_id)

    patch.setattr(Book, "end", end)


@mutant
def table_kept_when_released(patch: Patch) -> None:
    patch.setattr(Oracle, "release", lambda _self, _number: None)


@mutant
def one_token_too_many_computed(patch: Patch) -> None:
    original = Book.computed

    def computed(self: Book, share):
        is_cut = self.running[share.request_id].num_computed + share.num_tokens < len(
            self.running[share.request_id].tokens
        )
        return original(self, replace(share, num_tokens=share.num_tokens + is_cut))

    patch.setattr(Book, "computed", computed)


@mutant
def cancel_ignored(patch: Patch) -> None:
    patch.setattr(Engine, "cancel", lambda _self, _number: None)


@mutant
def deadline_ignored(patch: Patch) -> None:
    patch.setattr(Book, "late", lambda _self, _now_s: [])


@mutant
def ended_when_preempted_is_forgotten(patch: Patch) -> None:
    """One that is preempted waits for ever."""
    original = Book.preempt

    def preempt(self: Book, request_id: int) -> None:
        original(self, request_id)
        del self.waiting[request_id]

    patch.setattr(Book, "preempt", preempt)


# Policies


@mutant
def promised_blocks_not_counted(patch: Patch) -> None:
    patch.setattr(Room, "_blocks_to_come", lambda _self, _request: 0)


@mutant
def cached_blocks_counted_as_free_and_found(patch: Patch) -> None:
    """What a request finds in the cache stays free for others when it is admitted."""
    original = Room.admit

    def admit(self: Room, request: RequestView, limit: int | None = None) -> bool:
        return original(self, replace(request, num_freed=0), limit)

    patch.setattr(Room, "admit", admit)


@shown_by("contract")
def victim_s_shared_blocks_counted_as_free(patch: Patch) -> None:
    original = Room._preempt

    def preempt(self: Room, victim: RequestView) -> None:
        original(self, replace(victim, num_freed=victim.num_blocks))

    patch.setattr(Room, "_preempt", preempt)


@shown_by("fewest")
def job_taken_as_it_comes(patch: Patch) -> None:
    patch.setattr(GlobalPrefix, "arrange", lambda _self, job, _block_size: range(len(job)))


@shown_by("fewest")
def requests_that_pass_others(patch: Patch) -> None:
    original = Room.admit_all
    patch.setattr(Room, "admit_all", lambda self, *, passing=True: original(self))  # noqa: ARG005


@shown_by("fewest")
def room_kept_for_what_exists_alone(patch: Patch) -> None:
    original = Room.__init__

    def init(self: Room, view, budget, *, to_end: bool = False) -> None:  # noqa: ARG001
        original(self, view, budget)

    patch.setattr(Room, "__init__", init)


@shown_by("fewest")
def coming_blocks_not_waited_for(patch: Patch) -> None:
    original = Book._waiting_view

    def waiting_view(self: Book, state, found, _follows: int | None) -> RequestView:
        return original(self, state, found, None)

    patch.setattr(Book, "_waiting_view", waiting_view)


# The tests


@pytest.mark.parametrize("proof", PROOFS)
def test_without_a_defect_every_proof_holds(proof):
    PROOFS[proof]()


@pytest.mark.parametrize(
    ("mutate", "proof"), MUTANTS, ids=lambda one: getattr(one, "__name__", one)
)
def test_a_defect_is_caught(monkeypatch, mutate, proof):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, LookupError)):
        PROOFS[proof]()
