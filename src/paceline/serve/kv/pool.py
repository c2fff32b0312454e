"""A pool of blocks: free, held by one or more requests, or cached, which is held by no one."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NewType

Key = NewType("Key", bytes)
"""Names what a block holds: its tokens and all before them, of one tenant."""


class BlockPool:
    """Numbers of blocks, and what each is used for.

    A block that is dropped by its last holder is cached if its content has a name, and can be held
    again by that name until it is taken for something else: the one that has been cached longest
    goes first.

    Args:
        num_blocks: of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._num_holders = [0] * num_blocks
        self._keys: list[Key | None] = [None] * num_blocks
        self._blocks: dict[Key, int] = {}
        self._cached: dict[int, None] = {}  # in the order in which they will be taken

    @property
    def num_free(self) -> int:
        """Blocks that can be taken: cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that no one holds, and whose content has a name."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Blocks that someone holds."""
        return sum(count > 0 for count in self._num_holders)

    def take(self) -> int:
        """A block for new content, held once."""
        assert self.num_free, "more blocks are taken than are free"
        block = self._free.popleft() if self._free else self._evict()
        self._num_holders[block] = 1
        return block

    def find(self, key: Key) -> int | None:
        """The block with this content, if there is one."""
        return self._blocks.get(key)

    def hold(self, block: int) -> None:
        """One more holds a block that is held or cached."""
        if self._num_holders[block] == 0:
            del self._cached[block]
        self._num_holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One holder less of each; those given first are taken last for new content."""
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            assert self._num_holders[block] >= 0, f"block {block} is dropped more than it is held"
            if self._num_holders[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def name(self, block: int, key: Key) -> None:
        """Says what a held block holds; where another block has the name already, it keeps it."""
        if key not in self._blocks and self._keys[block] is None:
            self._blocks[key] = block
            self._keys[block] = key

    def num_holders(self, block: int) -> int:
        """How many hold a block."""
        return self._num_holders[block]

    def check(self) -> None:
        """Asserts that every block is in one state, and counted once."""
        held = {block for block, count in enumerate(self._num_holders) if count}
        states = (held, set(self._free), set(self._cached))
        assert sum(map(len, states)) == self.num_blocks, "a block is in no state, or in two"
        assert set.union(*states) == set(range(self.num_blocks)), "a block is lost"
        assert len(self._free) == len(states[1]), "a block is free twice"
        named = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {block: key for key, block in self._blocks.items()} == named, "names disagree"
        assert named.keys() >= states[2], "a cached block has no name"
        assert not named.keys() & states[1], "a free block has a name"

    def _evict(self) -> int:
        block = next(iter(self._cached))
        del self._cached[block]
        key = self._keys[block]
        assert key is not None, "a cached block has a name"
        del self._blocks[key]
        self._keys[block] = None
        return block
