from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import rng

COORDINATES = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**70), 2**70),
        "purpose": st.sampled_from(["sample", "initialise", "shuffle"]),
        "stream": st.integers(0, 2**64) | st.text(max_size=20),
        "position": st.integers(0, 2**64 - 1),
    }
)
HERE = {"seed": 3, "purpose": "sample", "stream": 5, "position": 7}
ELSEWHERE = {"seed": 4, "purpose": "shuffle", "stream": 6, "position": 8}


def test_the_bits_are_frozen():
    """Runs must repeat for ever. The words agree with Philox4x64-10 written from its paper."""
    words = rng.bits(6, seed=0, purpose="sample").tolist()
    assert words == [
        0x41DD47F443E9BC84,
        0x979F55A6BF3986AB,
        0xC9DFBB4AB38ABC8D,
        0x9D4DFF31E8C81473,
        0x1ECF3288765C8CDD,
        0xD81C73AE2CF9CF84,
    ]
    stream = "layers.3.attention.query"
    words = rng.bits(2, seed=7, purpose="initialise", stream=stream, position=2**40).tolist()
    assert words == [0x233CEFF6B6E0CD5F, 0xA220666CCF09E0E6]
    order = rng.permutation(8, seed=0, purpose="shuffle", stream=1).tolist()
    assert order == [4, 5, 6, 2, 3, 0, 1, 7]


@settings(deadline=None, max_examples=50)
@given(COORDINATES, COORDINATES, st.integers(0, 40))
def test_a_draw_depends_on_its_coordinates_alone(here, elsewhere, count):
    alone = rng.bits(count, **here)
    rng.bits(11, **elsewhere)
    np.random.seed(0)
    assert alone.dtype == np.uint64
    assert np.array_equal(rng.bits(count, **here), alone)
    assert np.array_equal(rng.bits(count + 9, **here)[:count], alone)


@pytest.mark.parametrize("change", HERE)
@pytest.mark.parametrize("draw", [rng.bits, rng.uniform, rng.gumbel, rng.normal])
def test_each_coordinate_changes_every_draw(draw, change):
    draws = draw(1000, **HERE)
    others = draw(1000, **{**HERE, change: ELSEWHERE[change]})
    assert not set(draws.tolist()) & set(others.tolist())


@pytest.mark.parametrize("draw", [rng.bits, rng.uniform, rng.gumbel, rng.normal])
def test_stream_and_position_are_0_unless_told(draw):
    key = {"seed": 1, "purpose": "test"}
    assert np.array_equal(draw(9, **key), draw(9, **key, stream=0, position=0))


def test_the_parts_of_a_key_do_not_run_together():
    word = rng.bits(1, seed=1, purpose="x", stream=11)
    assert word != rng.bits(1, seed=11, purpose="x", stream=1)
    assert word != rng.bits(1, seed=1, purpose="x1", stream=1)


def test_the_last_position_can_be_drawn_and_the_one_after_it_cannot():
    assert rng.bits(5, seed=0, purpose="sample", position=2**64 - 1).size == 5
    for position in (-1, 2**64):
        with pytest.raises(OverflowError):
            rng.bits(1, seed=0, purpose="sample", position=position)


def test_uniform_draws_are_even():
    draws = rng.uniform(20_000, seed=1, purpose="test")
    assert draws.dtype == np.float64
    counts, _ = np.histogram(draws, bins=10, range=(0.0, 1.0))
    assert counts.sum() == 20_000
    assert abs(counts - 2000).max() < 5 * math.sqrt(20_000 * 0.1 * 0.9)  # five sigma


def test_uniform_is_strictly_inside_even_for_extreme_words(monkeypatch):
    """Of 2**53 values the outermost are never met by chance in a test, so numpy is made to."""
    words = np.array([0, 1, 2**63, 2**64 - 2**11 - 1, 2**64 - 2, 2**64 - 1], dtype=np.uint64)
    source = SimpleNamespace(random_raw=lambda count: words[:count])
    monkeypatch.setattr(np.random, "Philox", lambda **_: source)
    draws = rng.uniform(6, seed=0, purpose="test")
    assert draws.min() > 0.0
    assert draws.max() < 1.0
    assert np.isfinite(rng.gumbel(6, seed=0, purpose="test")).all()
    assert np.isfinite(rng.normal(6, seed=0, purpose="test")).all()


def test_gumbel_argmax_samples_from_the_probabilities():
    probs = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    n = 10_000
    counts = np.zeros(5)
    for position in range(n):
        noise = rng.gumbel(5, seed=2, purpose="test", position=position)
        counts[np.argmax(np.log(probs) + noise)] += 1
    sigma = np.sqrt(n * probs * (1 - probs))
    assert (abs(counts - n * probs) < 5 * sigma).all()


def test_normal_draws_are_standard_and_independent():
    n = 20_001  # odd: the transform makes pairs
    draws = rng.normal(n, seed=3, purpose="test")
    assert draws.shape == (n,)
    root = math.sqrt(n)
    assert abs(draws.mean()) < 5 / root
    assert abs(draws.var() - 1) < 5 * math.sqrt(2) / root
    assert abs((abs(draws) < 1).mean() - math.erf(math.sqrt(0.5))) < 5 * 0.4655 / root
    half = n // 2 + 1
    assert abs(np.mean(draws[: half - 1] * draws[half:])) < 5 / math.sqrt(half)
    assert rng.normal(0, seed=3, purpose="test").size == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 100))
def test_a_permutation_holds_every_index_once(count, seed, epoch):
    order = rng.permutation(count, seed=seed, purpose="shuffle", stream=epoch)
    assert sorted(order.tolist()) == list(range(count))


def test_each_coordinate_changes_a_permutation():
    here = {"seed": 1, "purpose": "shuffle", "stream": 0}
    order = rng.permutation(100, **here)
    for change, value in {"seed": 2, "purpose": "other", "stream": 1}.items():
        assert not np.array_equal(rng.permutation(100, **{**here, change: value}), order)


def test_permutations_favour_no_index():
    orders = [rng.permutation(4, seed=0, purpose="shuffle", stream=n).tolist() for n in range(4000)]
    for place in range(4):
        counts = np.bincount([order[place] for order in orders], minlength=4)
        assert abs(counts - 1000).max() < 5 * math.sqrt(4000 * 0.25 * 0.75)
