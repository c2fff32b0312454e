"""Every benchmark runs on a small model, and names what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from paceline.bench import BENCHMARKS
from paceline.bench.outcome import MIN_PAIRS
from paceline.core.errors import UnknownNameError
from paceline.models.hf import WEIGHTS_FILE, write_weights
from paceline.models.hub import resolve
from paceline.models.weights import build

pytestmark = [pytest.mark.cpu, pytest.mark.slow]  # each side imports transformers anew

OF_MODELS = ["generate", "train"]  # the others have tests of their own


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small random model that `transformers` reads too."""
    source = resolve("random:llama:small")
    path = tmp_path_factory.mktemp("models") / "small"
    path.mkdir()
    for name, text in source.files.items():
        (path / name).write_text(text)
    names = [name for name, _ in build(source.spec).named_parameters()]
    weights = [(name, source.weights.read(name)) for name in names]
    write_weights(path / WEIGHTS_FILE, source.spec, weights, torch.float32)
    return path


def test_every_benchmark_is_tested_here_or_by_itself():
    here = Path(__file__).parent.glob("test_*.py")
    tested = {path.stem.removeprefix("test_").removeprefix("bench_") for path in here}
    assert {name.replace("-", "_") for name in BENCHMARKS} <= {*OF_MODELS, *tested}


@pytest.mark.parametrize("name", OF_MODELS)
def test_both_sides_are_measured(name, folder):
    outcome = BENCHMARKS.load(name)(against="transformers", model=str(folder), dtype="float32")
    assert outcome.ratios.pairs == MIN_PAIRS
    assert outcome.ratios.lowest <= outcome.ratios.median <= outcome.ratios.highest
    assert outcome.ours > 0
    assert outcome.peer > 0
    assert outcome.fraction == pytest.approx(outcome.ours / outcome.limit)
    assert "float32" in outcome.name


@pytest.mark.parametrize("name", OF_MODELS)
def test_an_unknown_peer_is_named(name):
    with pytest.raises(UnknownNameError, match="unknown peer 'vlm'"):
        BENCHMARKS.load(name)(against="vlm", model="any", dtype="float32")


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_model_that_the_peer_cannot_read_is_named(name):
    with pytest.raises(UnknownNameError, match="unknown model 'random:llama:tiny'"):
        BENCHMARKS.load(name)(against="transformers", model="random:llama:tiny", dtype="float32")


def test_decode_steps_of_several_sizes_are_measured(folder):
    found = BENCHMARKS.load("decode")(model=str(folder), dtype="float32")
    assert list(found) == ["1", "8", "32"]
    for outcome in found.values():
        assert outcome.ratios.pairs == MIN_PAIRS
        assert min(outcome.ours, outcome.peer, outcome.limit) > 0
