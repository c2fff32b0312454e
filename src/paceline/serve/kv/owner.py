"""Who holds which blocks of keys and values, and which content is found again.

Blocks of equal content are found by a chain of hashes: the name of a block is SHA-256 of the name
of the block before it and of its tokens, and the first one's predecessor is a root of the tenant
and the adapter. So equal names mean equal tokens from the first on, of one tenant, and the names
are the paths of a prefix tree. A request's own table only grows while it runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


class KVOwner:
    """The tables of all requests over one pool.

    Args:
        num_blocks: of the pool.
        block_size: tokens to a block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._tables: dict[int, list[int]] = {}
        self._num_named: dict[int, int] = {}
        self._coming: dict[Key, int] = {}  # content that is being computed, and by which request

    def found(self, keys: Sequence[Key]) -> list[int]:
        """The blocks that a request with these names finds, from the first on without a gap."""
        blocks: list[int] = []
        for key in keys:
            block = self.pool.find(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_coming(self, keys: Sequence[Key], num_found: int) -> bool:
        """Whether what a request finds no more is being computed by another: it had better wait."""
        return num_found < len(keys) and keys[num_found] in self._coming

    def num_unheld(self, blocks: Sequence[int]) -> int:
        """How many of them count as free until they are held."""
        return sum(self.pool.num_holders(block) == 0 for block in blocks)

    def num_own(self, request_id: int) -> int:
        """Blocks that only this request holds."""
        return sum(self.pool.num_holders(block) == 1 for block in self._tables[request_id])

    def num_blocks(self, request_id: int) -> int:
        """Blocks of a request's table."""
        return len(self._tables[request_id])

    def begin(self, request_id: int, keys: Sequence[Key]) -> list[int]:
        """A request's table begins with the blocks that it finds, which are returned.

        Args:
            request_id: of the request.
            keys: names of its full blocks; those that are not found are now being computed.
        """
        assert request_id not in self._tables, f"request {request_id} has a table"
        found = self.found(keys)
        for block in found:
            self.pool.hold(block)
        for key in keys[len(found) :]:
            self._coming.setdefault(key, request_id)
        self._tables[request_id] = found
        self._num_named[request_id] = len(found)
        return list(found)

    def reserve(self, request_id: int, num_tokens: int) -> tuple[int, ...]:
        """Makes room for a request's first `num_tokens`; the blocks that are new in its table."""
        table = self._tables[request_id]
        num_missing = -(-num_tokens // self.block_size) - len(table)
        new = tuple(self.pool.take() for _ in range(num_missing))
        table.extend(new)
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
        for index in range(self._num_named[request_id], num_full):
            self.pool.name(table[index], keys[index])
            self._coming.pop(keys[index], None)
        self._num_named[request_id] = max(num_full, self._num_named[request_id])

    def release(self, request_id: int) -> None:
        """Drops a request's blocks, if it has any."""
        self._num_named.pop(request_id, None)
        self._coming = {key: other for key, other in self._coming.items() if other != request_id}
        self.pool.drop(self._tables.pop(request_id, []))
