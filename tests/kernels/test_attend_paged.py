"""Attention over blocks by the C kernel: near the definition, and the same in any company."""

from __future__ import annotations

import pytest
import torch

from paceline.kernels.attend_paged import (
    SPLIT,
    Rows,
    attend_paged,
    keep_and_attend,
    takes_paged,
)

pytestmark = pytest.mark.cpu

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # of the largest; bfloat16 rounds to 2**-9
BLOCK = 16
SEQUENCES = ((0, 1), (5, 1), (SPLIT - 1, 1), (3 * SPLIT + 7, 1), (0, 70), (250, 19), (600, 3))
"""Tokens before, and in, the pass."""


@pytest.fixture(params=[1, 2], ids="{} threads".format, autouse=True)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Case:
    """Sequences with keys and values of their own, in shuffled blocks among others' garbage."""

    def __init__(self, sequences, *, heads=(6, 2), head_dim=64, dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(3)
        self.sequences, self.dtype = sequences, dtype
        num_heads, num_kv_heads = heads
        lengths = [before + new for before, new in sequences]
        counts = [-(-length // BLOCK) for length in lengths]
        shuffled = torch.randperm(sum(counts) + 3, generator=self.generator, dtype=torch.int32)
        self.tables = list(shuffled[: sum(counts)].split(counts))
        self.q = [self.draw(length, num_heads, head_dim) for length in lengths]
        self.k = [self.draw(length, num_kv_heads, head_dim) for length in lengths]
        self.v = [self.draw(length, num_kv_heads, head_dim) for length in lengths]
        self.shape = (len(shuffled), num_kv_heads, BLOCK, head_dim)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def run(self, which, window=None, attend=keep_and_attend):
        """What some sequences' new tokens get in one pass, in their order."""
        parts = [(index, *self.sequences[index]) for index in which]
        return self.compute(parts, window, attend)

    def compute(self, parts, window=None, attend=keep_and_attend):
        """Of (sequence, tokens before, new tokens)."""
        k_MKSH, v_MKSH = (torch.full(self.shape, torch.nan, dtype=self.dtype) for _ in range(2))
        starts = [0]
        for index, before, new in parts:
            starts.append(starts[-1] + new)
            self.fill(k_MKSH, self.k[index], index, before + new * (attend is attend_paged))
            self.fill(v_MKSH, self.v[index], index, before + new * (attend is attend_paged))
        tables = [self.tables[index] for index, _, _ in parts]
        rows = Rows(starts, [before for _, before, _ in parts], tables)
        new = [
            torch.cat([x[index][before : before + count] for index, before, count in parts])
            for x in (self.q, self.k, self.v)
        ]
        how = {"window": window, "scale": 0.2}
        if attend is attend_paged:
            return attend_paged(new[0], k_MKSH, v_MKSH, rows, **how)
        assert takes_paged(*new, k_MKSH)
        return keep_and_attend(*new, k_MKSH, v_MKSH, rows.laid(), **how)

    def fill(self, x_MKSH, x_SKH, index, count):
        for place in range(count):
            block = self.tables[index][place // BLOCK]
            x_MKSH[block, :, place % BLOCK] = x_SKH[place]

    def expected(self, which, window):
        """The definition, in float64."""
        found = []
        for index in which:
            before, new = self.sequences[index]
            q, k, v = (x[index].double() for x in (self.q, self.k, self.v))
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            scores = torch.einsum("tnh,snh->nts", q[before:], k) * 0.2
            apart = torch.arange(before, before + new)[:, None] - torch.arange(before + new)
            unseen = (apart < 0) | (apart >= (window or before + new + 1))
            scores = scores.masked_fill(unseen, -torch.inf).softmax(-1)
            found.append(torch.einsum("nts,snh->tnh", scores, v))
        return torch.cat(found)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 1, 40, SPLIT + 9])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((6, 2), 64), ((5, 1), 34), ((4, 4), 16), ((9, 3), 96)]
)
def test_near_the_definition(dtype, window, heads, head_dim):
    case = Case(SEQUENCES, heads=heads, head_dim=head_dim, dtype=dtype)
    which = range(len(SEQUENCES))
    expected = case.expected(which, window)
    found = case.run(which, window)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert float(error) <= BOUNDS[dtype]
    reference = case.run(which, window, attend_paged)
    assert float((reference.double() - expected).abs().max()) <= 4 * BOUNDS[dtype] * float(
        expected.abs().max()
    )


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_the_same_bits_alone_and_among_others(dtype, window):
    case = Case(SEQUENCES, dtype=dtype)
    which = range(len(SEQUENCES))
    together = case.run(which, window).split([new for _, new in SEQUENCES])
    for index in which:
        assert torch.equal(case.run([index], window), together[index])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("cuts", [(1,) * 560, (17, 240, 3, 300), (559, 1)], ids=len)
def test_the_same_bits_however_it_is_cut(dtype, cuts):
    case = Case([(0, 560)], dtype=dtype)
    whole = case.run([0])
    begins = [sum(cuts[:at]) for at in range(len(cuts))]
    for begin, count in list(zip(begins, cuts, strict=True))[-30:]:
        part = case.compute([(0, begin, count)])
        assert torch.equal(part, whole[begin : begin + count])
