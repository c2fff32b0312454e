"""The ladder of exactness, in float32, token for token: whatever an engine does to be fast.

Each rung is an equality with one request alone in a new engine under the plainest policy.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from engines import TOKENIZER, ask, encode

from paceline.models.decoder import Decoder
from paceline.models.families.llama import PRESETS
from paceline.models.hub import fetch, resolve
from paceline.models.weights import RandomWeights, build, fill
from paceline.serve.engine import Engine
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.request import Request
from paceline.serve.schedule import POLICIES
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.serial import serial

pytestmark = pytest.mark.cpu

WINDOW = 24  # smaller than the prompts: blocks of 16 lie partly and wholly outside of it
MODELS = ["full", "windowed"]
SHARED = "a preface that all of them share, of some length; "
PROMPTS = [SHARED + "one", "hello", SHARED + "two, " + SHARED, SHARED + "one", "x" * 70, SHARED]


@functools.cache
def model(kind: str) -> Decoder:
    """A tiny random model, that has a window in all layers but one, or in none."""
    spec = replace(PRESETS["tiny"], initializer_std=0.15)
    if kind == "windowed":
        spec = replace(spec, window=WINDOW, global_layers=(1,))
    if kind == "smollm2":
        source = resolve(str(fetch("smollm2-135m")))
        decoder = build(source.spec)
        fill(decoder, source.weights, torch.device("cpu"))
        return decoder
    decoder = build(spec)
    fill(decoder, RandomWeights(spec), torch.device("cpu"))
    return decoder


def engine(
    kind: str,
    policy=serial,
    *,
    max_batch_tokens: int = 512,
    max_sequences: int = 8,
    num_blocks: int = 128,
    block_size: int = 16,
) -> Engine:
    executor = LocalExecutor(model(kind), num_blocks, block_size)
    budget = Budget(max_batch_tokens, max_sequences)
    return Engine(executor, policy, budget, model(kind).spec, TOKENIZER)


def asked(kind: str) -> list[Request]:
    """Greedy and sampled ones, with shared prefixes and a twin."""
    top = {"ignore_eos": True, "max_tokens": 24}
    if kind == "smollm2":
        tokenizer = resolve(str(fetch("smollm2-135m"))).tokenizer
        ids = [tuple(tokenizer.encode(prompt * 2)) for prompt in PROMPTS]
    else:
        ids = [encode(prompt) for prompt in PROMPTS]
    seeds = [None, 3, 5, None, 7, 11]
    return [
        replace(ask("", seed=seed, **top), prompt_ids=prompt)
        for prompt, seed in zip(ids, seeds, strict=True)
    ]


@functools.cache
def alone(kind: str) -> tuple:
    """Each answer from a new engine, its prompt in one piece."""
    return tuple(engine(kind).generate([request])[0] for request in asked(kind))


def test_answers_differ_from_each_other():
    """Else equalities would say little."""
    for kind in MODELS:
        assert len({answer.token_ids for answer in alone(kind)}) == len(PROMPTS) - 1
    assert alone("full") != alone("windowed")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 16, 17, 40])
def test_chunked_equals_whole(kind, chunk):
    assert tuple(engine(kind, max_batch_tokens=chunk).generate(asked(kind))) == alone(kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_any_size_of_blocks_gives_the_same(kind, block_size):
    same = engine(kind, block_size=block_size, num_blocks=2048 // block_size)
    assert tuple(same.generate(asked(kind))) == alone(kind)


@pytest.mark.parametrize("kind", MODELS)
def test_cached_equals_uncached(kind):
    same = engine(kind)
    same.generate(asked(kind))
    before = same.book.num_found_tokens
    assert tuple(same.generate(asked(kind))) == alone(kind)
    assert same.book.num_found_tokens - before > 100


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_equals_serial(kind, name):
    same = engine(kind, POLICIES.load(name), max_batch_tokens=50)
    assert tuple(same.generate(asked(kind))) == alone(kind)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["stall-free", "prefill-first"])
def test_preempted_equals_not(kind, name):
    same = engine(kind, POLICIES.load(name), max_batch_tokens=50, num_blocks=12)
    assert tuple(same.generate(asked(kind))) == alone(kind)
    assert same.book.num_preempted > 0


@pytest.mark.parametrize("kind", MODELS)
def test_among_mates_equals_alone(kind):
    """Whoever they are and whenever they come."""
    requests, mates = asked(kind), [ask(f"mate {n}", seed=n, max_tokens=9) for n in range(12)]
    same = engine(kind, POLICIES.load("stall-free"), max_batch_tokens=33)
    answers = same.generate([*mates[:5], *requests, *mates[5:]])
    assert tuple(answers[5:-7]) == alone(kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("chunk", "num_blocks"), [(7, 128), (64, 128), (64, 14)])
def test_a_real_model_gives_the_same_under_every_policy(name, chunk, num_blocks):
    """Whole and in chunks, from the cache, and with few blocks."""
    same = engine("smollm2", POLICIES.load(name), max_batch_tokens=chunk, num_blocks=num_blocks)
    for _ in range(2):
        assert tuple(same.generate(asked("smollm2"))) == alone("smollm2")
    assert same.book.num_found_tokens > 0
