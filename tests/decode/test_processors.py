"""Sampler processors: each equals a slow reference, and the order is the one that is stated."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline.decode.processors import (
    Bias,
    Counts,
    History,
    MinP,
    NoEnd,
    Occurrence,
    Repetition,
    Temperature,
    TopK,
    TopP,
)
from paceline.decode.sampler import (
    Draw,
    Refused,
    Sampler,
    SamplingParams,
    processed_logits,
    sample,
    sample_rows,
)

pytestmark = pytest.mark.cpu

V = 12
NONE = History((), 0)
LOGITS = st.lists(
    st.integers(-4, 4).map(float) | st.floats(-8, 8, allow_subnormal=False), min_size=V, max_size=V
)
TOKENS = st.lists(st.integers(0, V - 1), max_size=20)


def row(values):
    return torch.tensor(values, dtype=torch.float64)


@settings(deadline=None, max_examples=200)
@given(TOKENS, st.lists(st.tuples(st.integers(0, 8), TOKENS), max_size=6), st.integers(0, 3))
def test_counts_follow_a_sequence_that_grows_and_is_cut_back(first, changes, start):
    counts, tokens = Counts(), first
    for num_cut, more in [(0, []), *changes]:
        tokens = [*tokens[: len(tokens) - num_cut], *more] if num_cut <= len(tokens) else more
        counts.follow(tokens[: len(tokens) - len(more)], start)  # as a rejection does: cut, then on
        found_U, times_U = counts.follow(tokens, start)
        found = {t: n for t, n in zip(found_U.tolist(), times_U.tolist(), strict=True) if n}
        assert found == Counter(tokens[start:])


def test_counts_of_many_tokens():
    tokens = list(range(1000)) * 2
    found_U, times_U = Counts().follow(tokens, 500)
    assert dict(zip(found_U.tolist(), times_U.tolist(), strict=True)) == Counter(tokens[500:])


def slow(logits, params, tokens, num_prompt, end_ids=(), min_tokens=0):
    """All processors, token by token, in the order that the sampler states.

    Returns the logits (None: dropped), and how far a bound was from being met by a hair.
    """
    answer = tokens[num_prompt:]
    scores = list(logits)
    for token in range(len(scores)):
        if token in tokens and params.repetition_penalty != 1:
            factor = params.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        scores[token] -= params.frequency_penalty * answer.count(token)
        scores[token] -= params.presence_penalty * (answer.count(token) > 0)
        scores[token] += sum(bias for other, bias in params.logit_bias if other == token)
    left = set(range(len(scores)))
    if len(answer) < min_tokens and left - set(end_ids):
        left -= set(end_ids)
    if params.temperature == 0:
        return {token: scores[token] for token in left}, 1.0
    scores = [score / params.temperature for score in scores]
    margin = 1.0
    order = sorted(left, key=lambda token: (-scores[token], token))
    if params.top_k and params.top_k < len(scores):
        least = scores[order[min(params.top_k, len(order)) - 1]]
        order = [token for token in order if scores[token] >= least]
        margin = min([margin, *(abs(scores[t] - least) or 1.0 for t in left)])
    if params.top_p < 1:
        weights = [math.exp(scores[token] - scores[order[0]]) for token in order]
        before, kept = 0.0, []
        for token, weight in zip(order, weights, strict=True):
            if before >= params.top_p:
                break
            before += weight / sum(weights)
            margin = min(margin, abs(before - params.top_p))
            kept.append(token)
        order = kept
    if params.min_p:
        bound = scores[order[0]] + math.log(params.min_p)
        margin = min([margin, *(abs(scores[t] - bound) or 1.0 for t in order)])
        order = [token for token in order if scores[token] >= bound]
    return {token: scores[token] for token in order}, margin


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 1.7]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    presence_penalty=st.sampled_from([0.0, -0.7, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -0.3, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.8]),
    logit_bias=st.lists(
        st.tuples(st.integers(0, V - 1), st.sampled_from([-100.0, -1.5, 2.0])),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ).map(tuple),
    seed=st.integers(0, 3),
)


@settings(deadline=None, max_examples=250)
@given(LOGITS, PARAMS, TOKENS, st.integers(0, 6), st.integers(0, 8), st.booleans())
def test_all_together_equal_a_slow_reference(logits, params, tokens, num_prompt, least, has_ends):
    num_prompt, end_ids = min(num_prompt, len(tokens)), (3, 5) if has_ends else ()
    expected, margin = slow(logits, params, tokens, num_prompt, end_ids, least)
    assume(margin > 1e-9)
    draw = Draw(params, len(tokens), tokens, num_prompt, None, least, end_ids)
    (found,) = sample_rows(row(logits)[None], [draw])
    assert found.token in expected
    if params.temperature == 0:
        assert expected[found.token] >= max(expected.values()) - 1e-9
    if not (has_ends and least):
        scores = processed_logits(row(logits), params, History(tokens, num_prompt)).tolist()
        if params.temperature:
            assert {t for t, score in enumerate(scores) if score > -math.inf} == expected.keys()
        for token, score in expected.items():
            assert math.isclose(scores[token], score, rel_tol=1e-12, abs_tol=1e-12)


def test_openais_penalties_by_hand():
    """mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, of the answer alone."""
    history = History([0, 0, 1, 2, 2, 2], 2)
    found = Occurrence(0.5, 0.25)(row([1.0, 1.0, 1.0, 1.0]), history)
    assert found.tolist() == [1.0, 1 - 0.25 - 0.5, 1 - 3 * 0.25 - 0.5, 1.0]


def test_ctrls_penalty_by_hand():
    """Of prompt and answer; negative logits become smaller, too."""
    found = Repetition(2.0)(row([4.0, -4.0, 4.0, -4.0, 0.0]), History([0, 1, 4, 1], 3))
    assert found.tolist() == [2.0, -8.0, 4.0, -4.0, 0.0]


def test_a_processor_leaves_the_row_that_it_is_given():
    logits_V = row([1.0, 3.0, 2.0, -1.0])
    history = History([1, 2, 2], 1)
    for process in (
        *(Repetition(2.0), Occurrence(1.0, 1.0), Bias([(1, 4.0)]), NoEnd(9, [1])),
        *(Temperature(2.0), TopK(1), TopP(0.3), MinP(0.9)),
    ):
        before = logits_V.clone()
        assert not torch.equal(process(logits_V, history), before), process
        assert torch.equal(logits_V, before)


def test_no_end_before_the_least_length():
    logits_V = row([1.0, 9.0, 2.0])
    no_end = NoEnd(2, [1])
    assert no_end(logits_V, History([0, 0], 1)).argmax() == 2
    assert no_end(logits_V, History([0, 0, 0], 1)).argmax() == 1
    nothing_else = row([-math.inf, 1.0, -math.inf])
    assert no_end(nothing_else, History([0], 1)).argmax() == 1


def test_bias_counts_each_pair():
    assert Bias([(1, 2.0), (0, -1.0)])(row([0.0, 0.0, 0.0]), NONE).tolist() == [-1.0, 2.0, 0.0]


@pytest.mark.parametrize("num", [300, 5000])
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 6.0])
def test_top_p_of_a_large_vocabulary_equals_a_whole_sort(num, top_p, spread):
    """What is sorted of it does not matter, ties at the bound of a part included."""
    generator = torch.Generator().manual_seed(num)
    logits_V = (torch.randn(num, generator=generator, dtype=torch.float64) * spread).round(
        decimals=1
    )
    sorted_V, order_V = logits_V.sort(descending=True, stable=True)
    probs_V = (sorted_V - sorted_V[0]).exp() / (logits_V - sorted_V[0]).exp().sum()
    kept_V = order_V[probs_V.cumsum(0) - probs_V < top_p]
    found_V = TopP(top_p)(logits_V, NONE)
    assert set(found_V.isfinite().nonzero()[:, 0].tolist()) == set(kept_V.tolist())
    assert torch.equal(found_V[kept_V], logits_V[kept_V])


def warpers(params):
    """The field's own, in its order."""
    transformers = pytest.importorskip("transformers")
    made = [transformers.TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        made.append(transformers.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(transformers.TopPLogitsWarper(params.top_p))
    if params.min_p:
        made.append(transformers.MinPLogitsWarper(params.min_p))
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        made.insert(0, transformers.RepetitionPenaltyLogitsProcessor(penalty))
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 1.4},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_equal_to_transformers(options):
    """The same tokens stay, with the same logits; float64 on both sides."""
    params = SamplingParams(**options)
    generator = torch.Generator().manual_seed(1)
    for number in range(20):
        logits_V = torch.randn(200, generator=generator, dtype=torch.float64) * 3
        tokens = torch.randint(0, 200, (30,), generator=generator)
        expected_V = logits_V[None]
        for process in warpers(params):
            expected_V = process(tokens[None], expected_V)
        found_V = processed_logits(logits_V, params, History(tokens.tolist(), number))
        assert torch.equal(found_V.isfinite(), expected_V[0].isfinite())
        kept_V = found_V.isfinite()
        torch.testing.assert_close(found_V[kept_V], expected_V[0, kept_V], rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(LOGITS, PARAMS, TOKENS), min_size=1, max_size=6), st.randoms())
def test_a_row_does_not_depend_on_the_others(asked, random):
    logits_RV = row([logits for logits, _, _ in asked])
    draws = [Draw(params, len(tokens), tokens, 0) for _, params, tokens in asked]
    alone = [sample_rows(logits_RV[i : i + 1], draws[i : i + 1])[0] for i in range(len(draws))]
    assert sample_rows(logits_RV, draws) == alone
    order = random.sample(range(len(draws)), len(draws))
    assert sample_rows(logits_RV[order], [draws[i] for i in order]) == [alone[i] for i in order]


@settings(deadline=None, max_examples=50)
@given(PARAMS, st.lists(LOGITS, min_size=1, max_size=8))
def test_what_a_sampler_remembers_equals_what_it_finds_out_anew(params, rows):
    """History kept as it grows, forgotten halfway, and never kept: the same tokens."""
    kept, forgetful, tokens = Sampler(), Sampler(), [1, 2, 1]
    for number, logits in enumerate(rows):
        draw = Draw(params, len(tokens), tokens, 2)
        found = kept.sample(row(logits)[None], {7: draw})
        if number == len(rows) // 2:
            forgetful.forget(7)
        assert forgetful.sample(row(logits)[None], {7: draw}) == found
        assert Sampler().sample(row(logits)[None], {7: draw}) == found
        assert not isinstance(found[7], Refused)
        tokens.append(found[7].token)


def test_logits_that_are_no_numbers_are_refused_alone():
    logits_RV = torch.stack([torch.full((V,), torch.nan), torch.zeros(V)]).double()
    for params in (SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(top_k=3)):
        found = sample_rows(logits_RV, [Draw(params, 3), Draw(params, 3)])
        assert isinstance(found[0], Refused)
        assert found[1] == sample_rows(logits_RV[1:], [Draw(params, 3)])[0]


def test_noise_is_made_for_what_is_left_and_is_the_same():
    logits_V = torch.linspace(-3, 3, 400, dtype=torch.float64)
    for position in range(200):
        params = SamplingParams(top_k=50, seed=4)
        scores_V = processed_logits(logits_V, params)
        whole = sample(scores_V, SamplingParams(seed=4), position)  # noise for all 400
        assert sample(logits_V, params, position) == whole


def test_frequencies_under_every_processor():
    """Each within five standard deviations of a binomial: one in two million by chance."""
    params = SamplingParams(
        temperature=0.9, top_k=8, top_p=0.97, min_p=0.01, presence_penalty=0.5,
        frequency_penalty=0.2, repetition_penalty=1.2, logit_bias=((2, 1.0),),
    )  # fmt: skip
    logits, tokens = [0.3 * token - 1 for token in range(V)], [0, 3, 3, 11]
    scores, _ = slow(logits, params, tokens, 1)
    total = sum(math.exp(score) for score in scores.values())
    num_draws, counts = 2000, Counter()
    for seed in range(num_draws):
        own = replace(params, seed=seed)
        (found,) = sample_rows(row(logits)[None], [Draw(own, 4, tokens, 1)])
        counts[found.token] += 1
    assert counts.keys() <= scores.keys()
    for token, score in scores.items():
        prob = math.exp(score) / total
        deviation = math.sqrt(prob * (1 - prob) / num_draws)
        assert abs(counts[token] / num_draws - prob) <= 5 * deviation, token
