"""A real model with windows: Gemma 3 270M, fetched, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.decode.sampler import SamplingParams
from paceline.models.hub import fetch
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine
from paceline.serve.request import Request

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "1 2 3 4 5 6 7 8 9 10 11",
    "Die Hauptstadt von Österreich ist",
    "¿Cuántos días tiene una semana? 🦙",
    "A list of  fruits:\n\n-",
    "In 1969, the first",
    "A word. " * 200,  # beyond the window of 512
]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder():
    return fetch("gemma3-270m")


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(folder):
    plan = Plan().with_overrides(['serve.dtype="float32"'])
    return load_engine(str(folder), plan, device="cpu")


@pytest.mark.parametrize("text", TEXTS)
def test_greedy_text_is_that_of_transformers(folder, theirs, engine, text):
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    assert engine.tokenizer.encode(text) == ids
    request = Request(
        prompt_ids=tuple(ids),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
    )
    (answer,) = engine.generate([request])
    expected = theirs.generate(
        torch.tensor([ids]),
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    assert list(answer.token_ids) == expected[0, len(ids) :].tolist()
