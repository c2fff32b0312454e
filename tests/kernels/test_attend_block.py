"""A block of attention is that of a plain softmax, and blocks make up the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from paceline.kernels.attend_block import (
    BlockMask,
    attend_block,
    attend_block_backward,
    attend_block_backward_reference,
    attend_block_reference,
    merge,
)

pytestmark = pytest.mark.cpu

B, T, S, H = 2, 7, 9, 8
SCALE = 0.3
ERRORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
# Of bfloat16, torch's fused kernel takes a fast exponential on CPUs without AVX512: 4e-5.
LSE_ERRORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-4}
HEADS = [(4, 4), (4, 2), (3, 1)]
MASKS = ["all", "causal", "some", "some rows none"]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def block_of(heads: tuple[int, int], dtype: torch.dtype, mask: str):
    """Queries, keys, values, what they see, and how the kernel is told."""
    num_heads, num_kv_heads = heads
    num_keys = T if mask == "causal" else S
    q, k, v = (
        draw(B, length, count, H, seed=seed, dtype=dtype)
        for seed, (length, count) in enumerate(
            [(T, num_heads), (num_keys, num_kv_heads), (num_keys, num_kv_heads)]
        )
    )
    seen = torch.ones(B, 1, T, num_keys, dtype=torch.bool)
    if mask == "causal":
        seen = seen.tril()
    elif mask != "all":
        seen = draw(B, 1, T, num_keys, seed=9) > 0
        seen[..., 0] = True
    if mask == "some rows none":
        seen[0, :, 2] = False
        seen[1, :, -1] = False
    block_mask = BlockMask.of(seen, dtype) if mask.startswith("some") else None
    return (q, k, v), seen, block_mask, mask == "causal"


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and logarithm of its sum in float64, with a graph."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * SCALE
    weights = torch.where(seen, scores.exp(), 0.0)
    sums = weights.sum(-1)
    out = torch.einsum("bnts,bsnh->btnh", weights / sums.clamp(min=1e-300)[..., None], v)
    return out, sums.log()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("run", [attend_block, attend_block_reference])
def test_a_block_is_a_plain_softmax_of_its_keys(run, dtype, heads, mask):
    tensors, seen, block_mask, is_causal = block_of(heads, dtype, mask)
    out, lse = run(*tensors, block_mask, is_causal=is_causal, scale=SCALE)
    expected_out, expected_lse = plain(*(x.double() for x in tensors), seen)
    assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    assert torch.equal(lse == -math.inf, expected_lse == -math.inf)
    assert not out.isnan().any()
    is_seeing = lse > -math.inf
    assert (lse - expected_lse)[is_seeing].abs().max() <= LSE_ERRORS[dtype]
    assert (out - expected_out).abs().max() <= ERRORS[dtype]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("run", [attend_block_backward, attend_block_backward_reference])
def test_gradients_of_a_block_follow_from_the_output_over_all_keys(run, dtype, heads, mask):
    """Those of a block whose queries have seen other keys too."""
    (q, k, v), seen, block_mask, is_causal = block_of(heads, dtype, mask)
    other_k, other_v = (draw(B, 3, heads[1], H, seed=seed, dtype=dtype) for seed in (20, 21))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    all_k = torch.cat([leaves[1], other_k.double()], dim=1)
    all_v = torch.cat([leaves[2], other_v.double()], dim=1)
    all_seen = torch.cat([seen, torch.ones(B, 1, T, 3, dtype=torch.bool)], dim=-1)
    out, lse = plain(leaves[0], all_k, all_v, all_seen)
    grad = draw(*out.shape, seed=30, dtype=dtype)
    expected = torch.autograd.grad(out, leaves, grad.double())
    out, lse = out.detach().to(dtype), lse.detach().to(dtype)
    found = run(grad, q, k, v, out, lse, block_mask, is_causal=is_causal, scale=SCALE)
    rest = run(grad, q, other_k, other_v, out, lse, None, is_causal=False, scale=SCALE)
    for mine, theirs in zip((found[0] + rest[0], *found[1:]), expected, strict=True):
        assert not mine.isnan().any()
        assert (mine - theirs).abs().max() <= 10 * ERRORS[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_add_up_to_the_whole_in_any_order(dtype):
    (q, k, v), seen, *_ = block_of((4, 2), dtype, "some rows none")
    expected_out, expected_lse = plain(*(x.double() for x in (q, k, v)), seen)
    for cuts in ([0, 4, 9], [0, 1, 2, 3, 9], [8, 9, 0, 8]):
        out = torch.zeros_like(q)
        lse = torch.full((B, 4, T), -math.inf, dtype=dtype)
        for start, end in pairwise(cuts):
            if start < end:
                mask = BlockMask.of(seen[..., start:end], dtype)
                keys = k[:, start:end], v[:, start:end]
                merge(out, lse, *attend_block(q, *keys, mask, is_causal=False, scale=SCALE))
        is_seeing = lse > -math.inf
        assert torch.equal(is_seeing, expected_lse > -math.inf)
        assert (out - expected_out).abs().max() <= ERRORS[dtype]
        assert (lse - expected_lse)[is_seeing].abs().max() <= ERRORS[dtype]


EXTREMES = [-math.inf, -3e38, -1e4, -700.0, 0.0, 700.0, 1e4, 3e38]


@pytest.mark.parametrize("own", EXTREMES)
@pytest.mark.parametrize("other", EXTREMES)
def test_sums_of_any_size_merge(own, other):
    """What is larger by far stands alone; equals weigh the same; nothing adds nothing."""
    out, lse = torch.full((1, 1, 1, 2), 3.0), torch.full((1, 1, 1), own)
    merge(out, lse, torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1), other))
    if other == -math.inf:
        expected = 3.0, own
    elif own == other:
        expected = 4.0, own + math.log(2)
    else:
        expected = (5.0, other) if other > own else (3.0, own)
    assert torch.equal(out, torch.full_like(out, expected[0]))
    assert float(lse) == pytest.approx(expected[1], rel=1e-6)


def test_extreme_scores_stay_finite():
    """Scores of 1e4 that a single exponential would not hold."""
    q, k, v = (1e2 * draw(1, 4, 1, H, seed=seed, dtype=torch.float32) for seed in range(3))
    out, lse = torch.zeros_like(q), torch.full((1, 1, 4), -math.inf)
    for part in range(4):
        keys = k[:, part : part + 1], v[:, part : part + 1]
        merge(out, lse, *attend_block(q, *keys, None, is_causal=False, scale=1.0))
    scores = torch.einsum("btnh,bsnh->bnts", q.double(), k.double())
    expected = torch.einsum("bnts,bsnh->btnh", scores.softmax(-1), v.double())
    assert torch.isfinite(out).all()
    assert (out - expected).abs().max() <= 1e-5 * v.abs().max()
