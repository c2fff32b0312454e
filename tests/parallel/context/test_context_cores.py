"""Every method attends as one process does, and sends what its docstring says."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cores import NAMES, Found, H, Rows, alone, on_ranks

from paceline.models.attention import attend_within
from paceline.models.layout import PADDING, Layout
from paceline.parallel.context import METHODS
from paceline.parallel.context.ring import GRADIENTS as KEY_GRADIENTS
from paceline.parallel.context.ring import KEYS
from paceline.parallel.context.token_ring import GRADIENTS, GUESTS, OUTPUTS, QUERIES
from paceline.parallel.context.ulysses import HEADS
from paceline.plan.tensor_rules import head_share

pytestmark = [pytest.mark.cpu, pytest.mark.ranks]

ONE = torch.zeros(2, 16, dtype=torch.int64)
PACKED = torch.tensor(
    [
        [0] * 1 + [1] * 17 + [2] * 1 + [3] * 3 + [PADDING] * 1,
        [0] * 5 + [1] * 1 + [2] * 1 + [3] * 12 + [4] * 4,
    ]
)
"""Documents of one token, longer than a chunk and across several; 23 tokens, which nothing divides.
"""
ROWS = {
    "one": Rows(ONE),
    "window": Rows(ONE, window=5),
    "packed": Rows(PACKED),
    "packed, window": Rows(PACKED, 6, 3, window=4),
    "uneven heads": Rows(ONE[:, :7], 5, 1),
}


def assert_same(found: Found, rows: Rows, bound: float) -> None:
    for name, mine, theirs in zip(NAMES, found.whole, alone(rows), strict=True):
        # What padding gives is nobody's: a fused kernel's own row of it may see what it likes.
        is_real = (rows.documents_BS != PADDING)[..., None, None]
        error = ((mine - theirs) * is_real).abs().max() / theirs.abs().max()
        assert error <= bound, (name, float(error))


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("method", METHODS)
def test_three_ranks_attend_as_one_does(method, name):
    assert_same(on_ranks(ROWS[name], method, 3), ROWS[name], 1e-13)


@pytest.mark.parametrize("cp", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_and_in_float32(method, cp):
    found = on_ranks(ROWS["packed"], method, cp, dtype=torch.float32)
    assert_same(found, ROWS["packed"], 1e-5)


@pytest.mark.parametrize("degree", [2, 3])
def test_heads_and_rings_of_six_ranks(degree):
    rows = Rows(PACKED, 6, 3)
    assert_same(on_ranks(rows, "ulysses-ring", 6, degree=degree), rows, 1e-13)


def test_in_bfloat16_outputs_are_added_in_float32():
    rows = ROWS["one"]
    found = on_ranks(rows, "ring", 4, dtype=torch.bfloat16)
    assert_same(found, rows, 2e-2)


def test_a_core_of_whole_rows_takes_no_part_of_them():
    layout = Layout.of_documents(ONE, torch.arange(8))
    q, k, v, _ = (x[:, :8] for x in ROWS["one"].tensors())
    with pytest.raises(RuntimeError, match="knows parts"):
        attend_within(q, k, v, layout=layout, site=ROWS["one"].site)


# Traffic

B, T = 2, 5
NUMBER, WIDE = 4, 4
"""Tokens of a rank and row, and bytes of a number, all float32."""


def traffic_of(method: str, cp: int, heads: tuple[int, int], **options) -> Found:
    rows = Rows(torch.zeros(B, T * cp, dtype=torch.int64), *heads)
    dtype = options.pop("dtype", torch.float32)
    return on_ranks(rows, method, cp, dtype=dtype, **options)


def both_ways(size_bytes: dict[str, int]) -> Counter[tuple[str, str]]:
    """What a rank sends it receives too."""
    pairs = ((operation, item) for operation in ("send", "receive") for item in size_bytes.items())
    return Counter({(operation, purpose): n for operation, (purpose, n) in pairs})


@pytest.mark.parametrize("narrow", [4, 2], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cp", [2, 3])
def test_a_ring_sends_keys_and_their_gradients(cp, narrow):
    dtype = torch.float32 if narrow == 4 else torch.bfloat16
    keys = 2 * B * T * 2 * H
    forward = both_ways({KEYS: (cp - 1) * keys * narrow})
    options = {"dtype": dtype, "is_forward_only": True}
    assert traffic_of("ring", cp, (4, 2), **options).traffic == [forward] * cp
    whole = both_ways({KEYS: 2 * (cp - 1) * keys * narrow, KEY_GRADIENTS: (cp - 1) * keys * WIDE})
    found = traffic_of("ring", cp, (4, 2), dtype=dtype)
    assert found.traffic == [whole] * cp
    assert set(found.links) == {(rank, (rank + 1) % cp) for rank in range(cp)}


def test_a_zigzag_sends_as_much_as_a_ring():
    rows = Rows(torch.zeros(B, 12, dtype=torch.int64))
    zigzag, ring = (on_ranks(rows, method, 3) for method in ("zigzag-ring", "ring"))
    assert (zigzag.traffic, zigzag.links) == (ring.traffic, ring.links)


@pytest.mark.parametrize("heads", [(4, 4), (5, 1), (6, 2)])
def test_ulysses_sends_heads_and_takes_them_back(heads):
    cp, unit = 3, B * T * H * NUMBER
    shares = [head_share(*heads, cp, rank) for rank in range(cp)]
    for is_forward_only in (True, False):
        found = traffic_of("ulysses", cp, heads, is_forward_only=is_forward_only)
        for rank, own in enumerate(shares):
            others = [share for other, share in enumerate(shares) if other != rank]
            queries = sum(len(share.query) for share in others)
            numbers = queries + 2 * sum(len(share.key) for share in others)
            numbers += (cp - 1) * len(own.query)
            if not is_forward_only:
                numbers += queries + (cp - 1) * (len(own.query) + 2 * len(own.key))
            assert found.traffic[rank] == {("all-to-all", HEADS): numbers * unit}


def test_a_ulysses_ring_sends_heads_to_some_and_keys_to_the_others():
    cp, degree, unit = 4, 2, B * T * H * NUMBER
    found = traffic_of("ulysses-ring", cp, (4, 2))
    heads = 2 + 2 * 1 + 2 + 2 + (2 + 2 * 1)  # of the other rank, and of this one
    keys = degree * 2 * 1 * unit  # of as many ranks' tokens, one key head
    expected = both_ways({KEYS: 2 * keys, KEY_GRADIENTS: keys})
    expected["all-to-all", HEADS] = heads * unit
    assert found.traffic == [expected] * cp
    assert set(found.links) == {(0, 2), (2, 0), (1, 3), (3, 1)}


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("cp", [2, 3, 4])
def test_a_token_ring_sends_queries_and_outputs(cp, heads):
    queries, sums = B * T * 4 * H * NUMBER, B * T * 4 * WIDE
    rows = Rows(torch.zeros(B, 2 * cp * T, dtype=torch.int64), *heads)
    queries, sums = 2 * queries, 2 * sums
    expected = {QUERIES: queries, OUTPUTS: queries + sums}
    expected |= {GUESTS: 3 * queries + sums, GRADIENTS: queries}
    found = on_ranks(rows, "token-ring", cp, dtype=torch.float32)
    assert found.traffic == [both_ways({p: (cp - 1) * n for p, n in expected.items()})] * cp
    busiest = cp * queries + sums + (cp - 1) * (3 * queries + sums) + queries
    assert {found.links[rank, (rank + 1) % cp] for rank in range(cp)} == {busiest}
    assert max(found.links.values()) == busiest


@pytest.mark.parametrize("is_forward_only", [True, False])
def test_the_busiest_link_of_a_token_ring_is_less_busy_where_heads_are_as_many(is_forward_only):
    """And busier where key heads are fewer; counted, of three ranks."""
    for heads, is_below in (((4, 4), True), ((4, 1), False)):
        rows = Rows(torch.zeros(B, 6 * T, dtype=torch.int64), *heads)
        token, ring = (
            max(
                on_ranks(
                    rows, method, 3, dtype=torch.float32, is_forward_only=is_forward_only
                ).links.values()
            )
            for method in ("token-ring", "ring")
        )
        assert (token < ring) is is_below, (heads, token, ring)
