"""Cached and chunked passes against whole ones: 1e-5 on float32 logits of size 1."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.decode.cache import ContiguousCache
from paceline.models.families.llama import PRESETS
from paceline.models.layout import Layout
from paceline.models.weights import RandomWeights, build, fill

pytestmark = pytest.mark.cpu

BOUND = 1e-5
SPEC = replace(PRESETS["tiny"], initializer_std=0.15)  # logits of size 1, unlike at 0.02
CPU = torch.device("cpu")


def make_model(spec=SPEC):
    model = build(spec)
    fill(model, RandomWeights(spec), CPU)
    return model.eval()


MODEL = make_model()
TOKENS = torch.randint(0, 259, (512,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def step(model, cache, tokens_T, *, num_kept=None):
    """Logits of the next tokens of a cached sequence, of which some or all are kept."""
    start = cache.num_tokens
    positions_T = torch.arange(start, start + len(tokens_T))
    logits_1TV = model(tokens_T[None], Layout(positions_T[None]), attend=cache.attend)
    cache.commit(len(tokens_T) if num_kept is None else num_kept)
    return logits_1TV[0]


@torch.inference_mode()
def whole(tokens_T, model=MODEL):
    return model(tokens_T[None])[0]


def new_cache(spec=SPEC):
    return ContiguousCache(spec, torch.float32, CPU)


def in_chunks(tokens_T, lengths, model=MODEL):
    cache = new_cache(model.spec)
    logits = torch.cat([step(model, cache, part) for part in tokens_T.split(lengths)])
    assert cache.num_tokens == len(tokens_T)
    return logits


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_prefill_at_any_split_equals_the_whole(lengths):
    tokens_T = TOKENS[: sum(lengths)]
    expected = whole(tokens_T)
    assert float(expected.std()) > 0.3  # or the bound would say little
    assert float((in_chunks(tokens_T, lengths) - expected).abs().max()) <= BOUND


@pytest.mark.parametrize("length", [1, 2, 255, 256, 257, 300])
def test_a_prompt_in_one_piece(length):
    tokens_T = TOKENS[:length]
    difference = (in_chunks(tokens_T, [length]) - whole(tokens_T)).abs().max()
    assert float(difference) <= BOUND


@pytest.mark.parametrize(
    "lengths",
    [[250, 20, 30], [256, 1, 1], [255, 1, 1, 1], [10, 490, 12], [300, 212], [1, 511]],
    ids=str,
)
def test_a_cache_grows_past_its_first_capacity(lengths):
    tokens_T = TOKENS[: sum(lengths)]
    difference = (in_chunks(tokens_T, lengths) - whole(tokens_T)).abs().max()
    assert float(difference) <= BOUND


@pytest.mark.parametrize("kv_heads", [1, 6])
def test_grouped_and_ungrouped_heads(kv_heads):
    model = make_model(replace(SPEC, num_kv_heads=kv_heads))
    tokens_T = TOKENS[:24]
    difference = (in_chunks(tokens_T, [7, 1, 16], model) - whole(tokens_T, model)).abs().max()
    assert float(difference) <= BOUND


def test_greedy_tokens_equal_those_without_a_cache():
    prompt = TOKENS[:11]
    cached, cache = prompt, new_cache()
    logits_TV = step(MODEL, cache, prompt)
    for _ in range(60):
        cached = torch.cat([cached, logits_TV[-1].argmax()[None]])
        logits_TV = step(MODEL, cache, cached[-1:])
    plain = prompt
    for _ in range(60):
        plain = torch.cat([plain, whole(plain)[-1].argmax()[None]])
    assert len(set(plain.tolist())) > 10
    assert cached.tolist() == plain.tolist()


def test_a_pass_that_is_not_committed_may_be_repeated_or_dropped():
    cache = new_cache()
    step(MODEL, cache, TOKENS[:5])
    wrong = step(MODEL, cache, TOKENS[40:50], num_kept=0)
    assert cache.num_tokens == 5
    first = step(MODEL, cache, TOKENS[5:9], num_kept=0)
    again = step(MODEL, cache, TOKENS[5:9])
    assert torch.equal(first, again)
    assert float((again - whole(TOKENS[:9])[5:]).abs().max()) <= BOUND
    assert float((wrong[:4] - again).abs().max()) > 0.1


def test_the_first_tokens_of_a_pass_may_be_kept():
    """As speculation keeps what it got right: three of the six, and others follow."""
    cache = new_cache()
    step(MODEL, cache, TOKENS[:5])
    step(MODEL, cache, torch.cat([TOKENS[5:8], TOKENS[100:103]]), num_kept=3)
    logits = step(MODEL, cache, TOKENS[8:12])
    assert float((logits - whole(TOKENS[:12])[8:]).abs().max()) <= BOUND


def test_a_cache_never_exceeds_the_context():
    spec = replace(SPEC, max_positions=300)
    model = make_model(spec)
    cache = new_cache(spec)
    step(model, cache, TOKENS[:290])
    step(model, cache, TOKENS[290:300])
    with pytest.raises(AssertionError, match="301 tokens exceed a context of 300"):
        step(model, cache, TOKENS[300:301])
    assert cache.num_tokens == 300


def test_a_cache_keeps_its_dtype():
    cache = ContiguousCache(SPEC, torch.bfloat16, CPU)
    model = make_model().to(torch.bfloat16)
    logits = torch.cat([step(model, cache, part) for part in TOKENS[:40].split([30, 10])])
    assert logits.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits of logits of size 1, through three layers.
    assert float((logits.float() - whole(TOKENS[:40])).abs().max()) < 0.2
