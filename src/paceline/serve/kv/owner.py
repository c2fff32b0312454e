"""Who holds which blocks of keys and values, and which content is found again.

Blocks of equal content are found by a chain of hashes: the name of a block is SHA-256 of the name
of the block before it and of its tokens, and the first one's predecessor is a root of the tenant
and the adapter. So equal names mean equal tokens from the first on, of one tenant, and the names
are the paths of a prefix tree. A request's own table only grows while it runs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paceline.serve.kv.pool import BlockPool, Key


def root(*parts: str) -> Key:
    """Where a chain begins: requests of one tenant and adapter share it, and no others."""
    digest = hashlib.sha256()
    for part in parts:
        text = part.encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return Key(digest.digest())


def extend(keys: list[Key], first: Key, tokens: Sequence[int], block_size: int) -> None:
    """Names of the blocks that `tokens` fill, put after those that are known.

    Args:
        keys: of the first blocks; grows.
        first: the root.
        tokens: of the request, from the first on.
        block_size: tokens to a block.
    """
    for index in range(len(keys), len(tokens) // block_size):
        content = np.asarray(tokens[index * block_size : (index + 1) * block_size], dtype="<u4")
        before = keys[-1] if keys else first
        keys.append(Key(hashlib.sha256(before + content.tobytes()).digest()))


@dataclass(slots=True)
class _Table:
    """What a request has.

    Attributes:
        blocks: in the order of its tokens.
        coming: names of blocks that it began to compute.
        num_named: of its first blocks, whose names are given.
        num_own: of its blocks, that no other request holds.
    """

    blocks: list[int]
    coming: Sequence[Key]
    num_named: int
    num_own: int = 0


class KVOwner:
    """The tables of all requests over one pool.

    Args:
        num_blocks: of the pool.
        block_size: tokens to a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[int, _Table] = {}
        self._coming: dict[Key, int] = {}  # content that is being computed, and by which request
        # The ids of a block's holders, xored: with one holder, that is its id.
        self._holders = [0] * num_blocks

    def found(self, keys: Sequence[Key]) -> list[int]:
        """The blocks that a request with these names finds, from the first on without a gap."""
        blocks: list[int] = []
        for key in keys:
            block = self.pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def computing(self, key: Key) -> int | None:
        """The request that is computing this content."""
        return self._coming.get(key)

    def num_unheld(self, blocks: Sequence[int]) -> int:
        """How many of them count as free until they are held."""
        return sum(self.pool.num_holders(block) == 0 for block in blocks)

    def num_own(self, request_id: int) -> int:
        """Blocks that only this request holds."""
        return self._tables[request_id].num_own

    def num_blocks(self, request_id: int) -> int:
        """Blocks of a request's table."""
        return len(self._tables[request_id].blocks)

    def begin(self, request_id: int, keys: Sequence[Key], most: int) -> list[int]:
        """A request's table begins with the blocks that it finds, which are returned.

        Args:
            request_id: of the request.
            keys: names of its full blocks; those that are not found are now being computed.
            most: of them that may be found.
        """
        assert request_id not in self._tables, f"request {request_id} has a table"
        found = self.found(keys[:most])
        table = self._tables[request_id] = _Table([], keys[len(found) :], len(found))
        for block in found:
            self.pool.hold(block)
            self._add(block, table, request_id)
        for key in table.coming:
            self._coming.setdefault(key, request_id)
        return found

    def reserve(self, request_id: int, num_tokens: int) -> tuple[int, ...]:
        """Makes room for a request's first `num_tokens`; the blocks that are new in its table."""
        table = self._tables[request_id]
        num_missing = -(-num_tokens // self.block_size) - len(table.blocks)
        new = tuple(self.pool.take() for _ in range(num_missing))
        for block in new:
            self._add(block, table, request_id)
        return new

    def commit(self, request_id: int, keys: Sequence[Key], num_tokens: int) -> None:
        """So many tokens of a request are computed: the blocks that they fill can be found.

        Args:
            request_id: of the request.
            keys: names of its blocks; those beyond `num_tokens` are not used.
            num_tokens: computed from the first on.
        """
        table = self._tables[request_id]
        num_full = min(num_tokens // self.block_size, len(keys))
        for index in range(table.num_named, num_full):
            self.pool.name(table.blocks[index], keys[index])
            self._coming.pop(keys[index], None)
        table.num_named = max(num_full, table.num_named)

    def release(self, request_id: int) -> None:
        """Drops a request's blocks, if it has any."""
        table = self._tables.pop(request_id, None)
        if table is None:
            return
        for key in table.coming:
            if self._coming.get(key) == request_id:
                del self._coming[key]
        for block in table.blocks:
            self._holders[block] ^= request_id
            if self.pool.num_holders(block) == 2:
                self._tables[self._holders[block]].num_own += 1
        self.pool.drop(table.blocks)

    def check(self) -> None:
        """Asserts that tables, counts and the pool agree."""
        self.pool.check()
        held = Counter(block for table in self._tables.values() for block in table.blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.num_holders(block) == held[block], "a block's holders are miscounted"
        for number, table in self._tables.items():
            num_own = sum(held[block] == 1 for block in table.blocks)
            assert table.num_own == num_own, f"the own blocks of request {number} are miscounted"
        assert set(self._coming.values()) <= self._tables.keys(), "what comes comes from nobody"

    def _add(self, block: int, table: _Table, request_id: int) -> None:
        """A block that a request now holds stands last in its table."""
        num_holders = self.pool.num_holders(block)
        if num_holders == 1:
            table.num_own += 1
        elif num_holders == 2:
            self._tables[self._holders[block]].num_own -= 1
        self._holders[block] ^= request_id
        table.blocks.append(block)
