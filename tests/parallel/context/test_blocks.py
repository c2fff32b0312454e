"""Blocks between parts hold every pair of a query and a key that it sees once, and few others."""

from __future__ import annotations

import pytest
import torch

from paceline.models.layout import PADDING, Layout
from paceline.parallel.context.blocks import Block, Blocks
from paceline.parallel.context.placement import Placement

pytestmark = pytest.mark.cpu

S = 24
ONE = torch.zeros(2, S, dtype=torch.int64)
PACKED = torch.tensor(
    [
        [0] * 1 + [1] * 17 + [2] * 1 + [3] * 3 + [PADDING] * 2,
        [0] * 5 + [1] * 1 + [2] * 1 + [3] * 12 + [4] * 5,
    ]
)
"""Documents of one token, longer than a chunk, across several, and padding."""
PLACEMENTS = [Placement(1), Placement(2), Placement(3), *(Placement(n, 1, True) for n in (2, 3, 4))]


def blocks_of(documents, placement, window):
    whole = Layout.of_documents(documents)
    device = torch.device("cpu")
    return Blocks(whole, placement, window=window, dtype=torch.float64, device=device)


def seen_by_block(block: Block, num_rows: int) -> torch.Tensor:
    """True where a query of the block sees a key."""
    size = block.queries.stop - block.queries.start, block.keys.stop - block.keys.start
    if block.mask is not None:
        assert not block.is_causal
        return (block.mask.bias_B1TS[:, 0] == 0).expand(num_rows, *size)
    seen = torch.ones(size, dtype=torch.bool)
    return (seen.tril() if block.is_causal else seen).expand(num_rows, *size)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
@pytest.mark.parametrize("documents", [ONE, PACKED], ids=["one", "packed"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_every_pair_is_in_one_block(placement, documents, window):
    mask = Layout.of_documents(documents).mask_B1TT(window)
    expected = torch.ones(1, S, S).tril() if mask is None else mask[:, 0]
    found = torch.zeros(2, S, S, dtype=torch.int64)
    num_pairs = 0
    blocks = blocks_of(documents, placement, window)
    parts = [
        torch.tensor([p for chunk in placement.part(index, S) for p in chunk])
        for index in range(placement.num_parts)
    ]
    for query_part, queries in enumerate(parts):
        for key_part, keys in enumerate(parts):
            for block in blocks.between(query_part, key_part):
                rows, columns = queries[block.queries], keys[block.keys]
                found[:, rows[:, None], columns] += seen_by_block(block, 2).long()
                num_pairs += block.num_pairs
    assert torch.equal(found, expected.expand_as(found).long())
    assert num_pairs == int(expected.sum())  # of the rows that differ


def test_a_causal_row_needs_no_mask():
    """Zigzag: of the four blocks between two ranks' chunks two, of a rank's own three."""
    blocks = blocks_of(ONE, Placement(3, is_zigzag=True), None)
    for query_part in range(3):
        for key_part in range(3):
            found = blocks.between(query_part, key_part)
            assert [block.mask for block in found] == [None] * len(found)
            assert len(found) == (3 if query_part == key_part else 2)
            assert sum(block.is_causal for block in found) == 2 * (query_part == key_part)


def test_a_ring_leaves_what_comes_later_out():
    blocks = blocks_of(ONE, Placement(3), None)
    numbers = [[len(blocks.between(q, k)) for k in range(3)] for q in range(3)]
    assert numbers == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_keys_that_no_query_of_a_chunk_sees_are_left_out():
    """Of a window of 3, two keys of the chunk before, and two queries that see them."""
    (block,) = blocks_of(ONE, Placement(3), 3).between(1, 0)
    assert (block.queries, block.keys) == (slice(0, 2), slice(6, 8))


def test_work_is_even_in_a_zigzag_and_not_in_a_ring():
    """Counted pairs, of a long causal row: within 5 %; the ring's last rank has seven times as
    much as its first of four.
    """
    documents = torch.zeros(1, 512, dtype=torch.int64)
    work = {}
    for is_zigzag in (True, False):
        blocks = blocks_of(documents, Placement(4, is_zigzag=is_zigzag), None)
        work[is_zigzag] = [
            sum(block.num_pairs for k in range(4) for block in blocks.between(q, k))
            for q in range(4)
        ]
    assert sum(work[True]) == sum(work[False]) == 512 * 513 // 2
    assert max(work[True]) <= 1.05 * min(work[True])
    assert max(work[False]) > 6.5 * min(work[False])


def test_blocks_are_made_once():
    blocks = blocks_of(PACKED, Placement(2), 5)
    assert blocks.between(1, 0) is blocks.between(1, 0)
