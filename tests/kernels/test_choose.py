"""Tokens of many rows: those of the sampler that takes one row at a time."""

from __future__ import annotations

import pytest
import torch

from paceline.decode.sampler import Draw, SamplingParams, draw_plainly, sample, sample_rows
from paceline.kernels.choose import highest_rows

pytestmark = pytest.mark.cpu


def logits(rows, words, dtype, size=3.0):
    generator = torch.Generator().manual_seed(rows + words)
    return (size * torch.randn(rows, words, generator=generator)).to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_first_of_the_highest(dtype):
    logits_RV = logits(9, 1003, dtype)
    logits_RV[1] = 2.0
    logits_RV[2] = -torch.inf
    logits_RV[3, 500] = torch.nan
    logits_RV[4, [7, 900]] = torch.inf
    first = [row.tolist().index(row.max().item()) for row in logits_RV[[0, 1, 2, 4, 5, 6, 7, 8]]]
    assert highest_rows(logits_RV) == [*first[:3], 500, *first[3:]]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1e-40, 0.01, 0.7, 1.0, 5.0])
@pytest.mark.parametrize("size", [0.0, 3.0, 30.0])
def test_draws_are_the_samplers(dtype, temperature, size):
    logits_RV = logits(40, 1021, dtype, size)
    params = [
        SamplingParams(temperature=temperature, seed=row % 7, stream=row) for row in range(40)
    ]
    draws = [Draw(one, 100 + row) for row, one in enumerate(params)]
    expected = [
        sample(row, draw.params, draw.position) for row, draw in zip(logits_RV, draws, strict=True)
    ]
    assert [one.token for one in sample_rows(logits_RV, draws)] == expected
    if size and temperature > 1e-3:  # else ties are the sampler's
        assert draw_plainly(logits_RV, draws) == expected


@torch.inference_mode()
def test_what_cannot_be_compared_is_the_samplers():
    logits_RV = logits(3, 64, torch.float32)
    logits_RV[0] = -torch.inf
    logits_RV[1, 9] = torch.nan
    draws = [Draw(SamplingParams(seed=1), 4)] * 3
    assert [token is None for token in draw_plainly(logits_RV, draws)] == [True, True, False]
