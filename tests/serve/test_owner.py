"""Tables of blocks, by hand: what is found, what is coming, and who holds what alone."""

from __future__ import annotations

import pytest

from paceline.serve.kv.owner import KVOwner, extend, root
from paceline.serve.kv.pool import Key

SIZE = 2


def keys_of(*tokens: int, tenant: str = "") -> list[Key]:
    keys: list[Key] = []
    extend(keys, root(tenant, ""), tokens, SIZE)
    return keys


def compute(owner: KVOwner, number: int, keys: list[Key], most: int = 0) -> tuple[int, ...]:
    """A request that finds at most so many blocks and computes all of them."""
    owner.begin(number, keys, most)
    blocks = owner.reserve(number, SIZE * len(keys))
    owner.commit(number, keys, SIZE * len(keys))
    return blocks


def test_a_name_says_all_that_comes_before():
    assert keys_of(1, 1, 2, 2)[1] != keys_of(3, 3, 2, 2)[1]
    assert keys_of(1, 1)[0] == keys_of(1, 1, 2, 2)[0] != keys_of(1, 1, tenant="a")[0]
    assert root("ab", "c") != root("a", "bc")


def test_nothing_is_found_beyond_a_gap():
    """Where two computed the same block, only one has its name, and may go before what follows."""
    owner = KVOwner(4, SIZE)
    keys = keys_of(1, 1, 2, 2)
    compute(owner, 0, keys[:1])
    _, second = compute(owner, 1, keys)
    owner.release(0)
    assert owner.found(keys) == [0, second]
    compute(owner, 2, keys_of(5, 5, 6, 6))  # the first block is taken for something else
    assert owner.pool.find(keys[1]) == second
    assert owner.found(keys) == []
    owner.check()


def test_own_blocks_are_those_that_nobody_shares():
    owner = KVOwner(8, SIZE)
    keys = keys_of(1, 1, 2, 2, 3, 3)
    compute(owner, 5, keys)
    assert owner.num_own(5) == 3
    assert len(owner.begin(6, keys, 2)) == 2
    assert (owner.num_own(5), owner.num_own(6)) == (1, 0)
    assert len(owner.begin(7, keys, 1)) == 1
    owner.release(5)
    assert (owner.num_own(6), owner.num_own(7)) == (1, 0)
    owner.release(6)
    assert owner.num_own(7) == 1
    owner.check()


@pytest.mark.parametrize("is_computed", [True, False])
def test_what_is_coming_is_computed_or_taken_back(is_computed):
    owner = KVOwner(8, SIZE)
    keys = keys_of(1, 1, 2, 2)
    owner.begin(3, keys, 1)
    owner.begin(4, keys, 1)
    assert [owner.computing(key) for key in keys] == [3, 3]
    if is_computed:
        owner.reserve(3, 3)
        owner.commit(3, keys, 3)
        assert [owner.computing(key) for key in keys] == [None, 3]
    owner.release(3)
    assert [owner.computing(key) for key in keys] == [None, None]
