"""A real model: SmolLM2-135M-Instruct, fetched, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from paceline.decode.sampler import SamplingParams
from paceline.models.chat import render_chat
from paceline.models.hub import fetch, resolve
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine
from paceline.serve.request import Request

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about a bicycle.",
    "Explain why the sky is blue, as to a child.",
    "¿Cuántos días tiene una semana? 🦙",
    "List three prime numbers above 100.",
]
TEXTS = [
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "1 2 3 4 5 6 7 8 9 10 11",
    "Die Hauptstadt von Österreich ist",
]
NUM_TOKENS = 64


@pytest.fixture(scope="module")
def folder():
    return fetch("smollm2-135m")


@pytest.fixture(scope="module")
def theirs(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(folder):
    plan = Plan().with_overrides(['serve.dtype="float32"'])
    return load_engine(str(folder), plan, device="cpu")


@pytest.fixture(scope="module")
def prompts(folder):
    """Ten prompts as ids, made by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return chats + [tokenizer(text)["input_ids"] for text in TEXTS]


def test_prompts_are_those_of_transformers(folder, prompts):
    tokenizer = resolve(str(folder)).tokenizer
    ours = []
    for question in QUESTIONS:
        prompt = render_chat(tokenizer, [{"role": "user", "content": question}])
        ours.append(tokenizer.encode(prompt, add_special_tokens=False))
    assert ours + [tokenizer.encode(text) for text in TEXTS] == prompts


@torch.no_grad()
def test_logits_equal_those_of_transformers(engine, theirs, prompts):
    """1e-5 of the largest: these logits are of size 20, where the tiny models' are of size 1."""
    model = engine._executor._model
    for prompt in prompts[:2]:
        tokens_BT = torch.tensor([prompt])
        expected = theirs(tokens_BT).logits
        difference = (model(tokens_BT) - expected).abs().max()
        assert float(difference) <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_greedy_text_is_identical(engine, theirs, prompts):
    greedy = SamplingParams(temperature=0)
    requests = [
        Request(prompt_ids=tuple(prompt), sampling=greedy, max_tokens=NUM_TOKENS)
        for prompt in prompts
    ]
    answers = engine.generate(requests)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        assert list(answer.token_ids) == ids[0, len(prompt) :].tolist()
    assert len(answers) == 10
    assert sum(len(answer.token_ids) == NUM_TOKENS for answer in answers) >= 7


def test_a_sampled_answer_is_the_same_alone_and_after_others(folder, engine, prompts):
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=17)
    request = Request(prompt_ids=tuple(prompts[1]), sampling=sampling, max_tokens=32)
    other = Request(
        prompt_ids=tuple(prompts[7]),
        sampling=SamplingParams(temperature=1.0, seed=5),
        max_tokens=12,
    )
    plan = Plan().with_overrides(['serve.dtype="float32"'])
    alone = load_engine(str(folder), plan, device="cpu").generate([request])[0]
    assert engine.generate([other, request, other])[1] == alone
    deltas, others = [], []
    engine.submit(request, deltas.append)
    for _ in range(10):
        engine.step()
    engine.submit(other, others.append)
    engine.drain()
    assert tuple(token for delta in deltas for token in delta.token_ids) == alone.token_ids
    assert "".join(delta.text for delta in deltas) == alone.text
