"""Log-probabilities: the model's own, exact, whatever is asked of the sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.decode.logprobs import Sampled, with_logprobs
from paceline.decode.sampler import Draw, SamplingParams, sample_rows

pytestmark = pytest.mark.cpu


def reference(logits_V):
    """In float64, by numpy."""
    values = np.asarray(logits_V.double())
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_rows", [1, 31, 33])
def test_exact_against_float64(dtype, num_rows):
    generator = torch.Generator().manual_seed(3)
    logits_RV = (torch.randn(num_rows, 500, generator=generator) * 5).to(dtype)
    tokens = torch.randint(0, 500, (num_rows,), generator=generator).tolist()
    for index, found in enumerate(with_logprobs(logits_RV, tokens, 5)):
        expected = reference(logits_RV[index])
        assert found.token == tokens[index]
        assert found.logprob == pytest.approx(expected[found.token], rel=0, abs=1e-12)
        best = sorted(range(500), key=lambda token: (-expected[token], token))[:5]
        assert [token for token, _ in found.top] == best
        assert [p for _, p in found.top] == pytest.approx([expected[t] for t in best], abs=1e-12)


def test_of_equal_ones_those_that_come_first():
    logits_RV = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, -torch.inf]])
    (found,) = with_logprobs(logits_RV, [4], 4)
    assert [token for token, _ in found.top] == [1, 3, 0, 2]
    (found,) = with_logprobs(logits_RV, [4], 0)
    assert found.top == ()


def test_they_are_the_models_whatever_the_sampler_does():
    logits_RV = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    asked = [
        (SamplingParams(temperature=0.3, top_k=2, logit_bias=((3, 50.0),)), 0),
        (SamplingParams(temperature=0), 3),
        (SamplingParams(temperature=2.0, seed=4), 50),
        (SamplingParams(temperature=0, presence_penalty=1.0), None),
    ]
    draws = [Draw(params, 5, [1, 2, 3], 1, num) for params, num in asked]
    found = sample_rows(logits_RV, draws)
    plain = sample_rows(logits_RV, [Draw(d.params, 5, d.history, 1) for d in draws])
    assert [one.token for one in found] == [one.token for one in plain]
    assert found[3] == Sampled(found[3].token)
    for index, num in enumerate([0, 3, 50]):
        expected = reference(logits_RV[index])
        assert found[index].logprob == pytest.approx(expected[found[index].token], abs=1e-12)
        assert len(found[index].top) == num
    assert found[0].token == 3  # the bias has decided, and is not in its log-probability
    assert found[0].logprob < -1
