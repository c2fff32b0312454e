"""Sampling: the right probabilities, and nothing but seed, stream and position decides."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline.decode.sampler import SamplingParams, processed_logits, sample

pytestmark = pytest.mark.cpu

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, 1.9, -torch.inf])
NUM_DRAWS = 5_000


def kept(logits_V, **params):
    """The tokens that may be sampled."""
    scores_V = processed_logits(logits_V, SamplingParams(**params))
    return {token for token, score in enumerate(scores_V.tolist()) if score > -math.inf}


def softmax(scores):
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    return [weight / sum(weights) for weight in weights]


def slow_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, then top-k (what ties with the k-th stays), then top-p, token by token.

    Returns the probability of each token that stays, and how far top-p was from being reached
    by a hair, where rounding would decide.
    """
    scores = [logit / temperature for logit in logits]
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if top_k:
        least = scores[order[min(top_k, len(order)) - 1]]
        order = [token for token in order if scores[token] >= least]
    probs = softmax([scores[token] for token in order])
    total, stay, margin = 0.0, [], 1.0
    for token, prob in zip(order, probs, strict=True):
        if top_p < 1.0 and total >= top_p:
            break
        total += prob
        margin = min(margin, abs(total - top_p))
        stay.append(token)
    probs = softmax([scores[token] for token in stay])
    return dict(zip(stay, probs, strict=True)), margin


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.75},
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["position", "stream", "seed"])
def test_frequencies_are_the_probabilities(params, vary):
    """Each within five standard deviations of a binomial: one in two million by chance."""
    expected, _ = slow_probabilities(LOGITS.tolist(), **params)
    counts = Counter()
    for number in range(NUM_DRAWS):
        where = {"seed": 3, "stream": 1} | ({vary: number} if vary != "position" else {})
        sampling = SamplingParams(**params, **where)
        counts[sample(LOGITS, sampling, number if vary == "position" else 17)] += 1
    assert counts.keys() <= expected.keys()
    total = counts.total()
    for token, prob in expected.items():
        deviation = math.sqrt(prob * (1 - prob) / total)
        assert abs(counts[token] / total - prob) <= 5 * deviation, token


LOGIT_LISTS = st.lists(
    st.integers(-4, 4).map(float) | st.floats(-8, 8, allow_subnormal=False), min_size=1, max_size=12
)


@settings(deadline=None, max_examples=300)
@given(
    LOGIT_LISTS,
    st.sampled_from([0.3, 1.0, 1.5]),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.3, 0.7, 0.95, 1.0]),
)
def test_what_is_kept_equals_a_slow_reference(logits, temperature, top_k, top_p):
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    expected, margin = slow_probabilities(logits, **params)
    assume(top_p == 1.0 or margin > 1e-9)
    logits_V = torch.tensor(logits, dtype=torch.float64)
    assert kept(logits_V, **params) == expected.keys()
    probs = processed_logits(logits_V, SamplingParams(**params)).softmax(0).tolist()
    for token, prob in expected.items():
        assert math.isclose(probs[token], prob, rel_tol=1e-12)


def test_top_k_and_top_p_by_hand():
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept(logits_V, top_k=1) == {1}
    assert kept(logits_V, top_k=2) == {1, 3}
    assert kept(logits_V, top_k=0) == kept(logits_V, top_k=4) == kept(logits_V, top_k=9)
    assert kept(logits_V, top_p=0.39) == {1}
    assert kept(logits_V, top_p=0.41) == {1, 3}
    assert kept(logits_V, top_p=0.95) == {0, 1, 2, 3}
    assert kept(logits_V, top_p=1e-9) == {1}  # the most likely one always stays
    # Top-p counts what top-k has left: 0.4 / 0.7 of it is the first.
    assert kept(logits_V, top_k=2, top_p=0.5) == {1}
    assert kept(logits_V, top_k=2, top_p=0.6) == {1, 3}


def test_tokens_that_tie():
    assert kept(torch.tensor([1.0, 2.0, 2.0, 0.0]), top_k=1) == {1, 2}
    assert kept(torch.zeros(4), top_p=0.45) == {0, 1}  # a quarter each, in order
    assert kept(torch.zeros(4), top_p=0.5) == {0, 1}  # reached is enough
    assert kept(torch.zeros(4), top_p=0.51) == {0, 1, 2}
    assert kept(torch.zeros(1024), top_p=0.25) == set(range(256))


@given(LOGIT_LISTS.filter(lambda logits: len(set(logits)) == len(logits)), st.integers(0, 99))
@settings(deadline=None)
def test_temperature_zero_takes_the_most_likely(logits, position):
    best = max(range(len(logits)), key=logits.__getitem__)
    logits_V = torch.tensor(logits, dtype=torch.float64)
    greedy = SamplingParams(temperature=0, top_k=3, top_p=0.5, seed=position)
    assert sample(logits_V, greedy, position) == best


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_tiny_temperature_is_nearly_none(temperature, top_p):
    logits_V = torch.tensor([1.0, 5.0, 4.0, -2.0])
    params = SamplingParams(temperature=temperature, top_p=top_p)
    assert [sample(logits_V, params, position) for position in range(50)] == [1] * 50


def test_a_token_depends_on_seed_stream_and_position_alone():
    here = SamplingParams(temperature=1.3, seed=11, stream=2)
    alone = [sample(LOGITS, here, position) for position in range(100)]
    drawn = {}
    for position in reversed(range(100)):
        torch.manual_seed(position)
        np.random.seed(position)
        sample(LOGITS, replace(here, seed=position), 3)
        sample(LOGITS.flip(0), here, position)
        drawn[position] = sample(LOGITS, here, position)
    assert [drawn[position] for position in range(100)] == alone


@pytest.mark.parametrize("change", [{"seed": 12}, {"stream": 3}])
def test_another_seed_or_stream_is_another_draw(change):
    here = SamplingParams(seed=11, stream=2)
    ours = [sample(LOGITS, here, position) for position in range(200)]
    others = [sample(LOGITS, replace(here, **change), position) for position in range(200)]
    agree = sum(a == b for a, b in zip(ours, others, strict=True)) / 200
    chance = sum(prob**2 for prob in slow_probabilities(LOGITS.tolist())[0].values())
    assert abs(agree - chance) < 5 * math.sqrt(chance * (1 - chance) / 200)
    shifted = [sample(LOGITS, here, position + 1) for position in range(200)]
    assert shifted != ours


def test_draws_are_frozen():
    """Answers with a seed must repeat for ever, whatever becomes of the sampler."""
    logits_V = torch.linspace(-1, 1, 50)
    params = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=5)
    drawn = [sample(logits_V, params, position) for position in range(12)]
    assert drawn == [38, 30, 34, 30, 49, 24, 22, 45, 49, 27, 34, 44]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_dtype(dtype):
    logits_V = LOGITS.to(dtype)
    scores_V = processed_logits(logits_V, SamplingParams())
    assert scores_V.dtype == torch.float64
    for position in range(20):
        expected = sample(logits_V.double(), SamplingParams(), position)
        assert sample(logits_V, SamplingParams(), position) == expected
