"""What is asked of sampling, on a real model whose tokens split characters."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from paceline.decode.grammar import Grammar
from paceline.decode.sampler import Sampled
from paceline.models.hub import fetch
from paceline.plan.plan import Plan
from paceline.serve.load import load_engine
from paceline.serve.options import Options
from paceline.serve.request import AnswerText

pytestmark = [pytest.mark.cpu, pytest.mark.slow]

PROMPTS = [
    "Once upon a time, in a village by the sea,",
    "1 2 3 1 2 3 1 2 3",
    "Die Hauptstadt von Österreich ist",
]


@pytest.fixture(scope="module")
def folder():
    return fetch("smollm2-135m")


@pytest.fixture(scope="module")
def engine(folder):
    plan = Plan().with_overrides(['serve.dtype="float32"'])
    return load_engine(str(folder), plan, device="cpu")


@pytest.mark.parametrize("penalty", [1.3, 0.9])
def test_repetition_penalty_greedily_equals_transformers(folder, engine, penalty):
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    options = Options(max_tokens=40, repetition_penalty=penalty, ignore_eos=True)
    answers = engine.generate([options.request(prompt) for prompt in prompts])
    for prompt, answer in zip(prompts, answers, strict=True):
        found = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(answer.token_ids) == found[0, len(prompt) :].tolist()


def test_prompt_log_probabilities_equal_transformers(folder, engine):
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = engine.tokenizer.encode(prompt)
        request = Options(max_tokens=1, prompt_logprobs=1).request(ids)
        (answer,) = engine.generate([request])
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = [float(logits_TV[i, token]) for i, token in enumerate(ids[1:])]
        assert [one.logprob for one in answer.prompt_logprobs] == pytest.approx(expected, abs=2e-4)
        best = [int(logits_V.argmax()) for logits_V in logits_TV[:-1]]
        assert [one.top[0][0] for one in answer.prompt_logprobs] == best


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


def test_answers_satisfy_their_grammars(engine):
    prompt = engine.tokenizer.encode("A person, described in JSON:\n")
    for temperature in (0.0, 1.0, 2.0):
        options = [
            Options(
                max_tokens=250,
                temperature=temperature,
                seed=seed,
                grammar=Grammar("json", json.dumps(SCHEMA)),
            )
            for seed in range(4)
        ]
        for answer in engine.generate([one.request(prompt) for one in options]):
            assert answer.finish_reason == "stop"
            found = json.loads(answer.text)
            assert set(found) == set(SCHEMA["properties"])
            assert len(found["name"]) <= 20
            assert 0 <= found["age"] <= 120
            assert set(found["pets"]) <= {"cat", "dog"}
    pattern = "(日本|é🦙|[a-z ]{3}){2,6}!"
    options = Options(max_tokens=80, temperature=2.0, seed=1, grammar=Grammar("regex", pattern))
    (answer,) = engine.generate([options.request(prompt)])
    assert re.fullmatch(pattern, answer.text)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.sampled_from("aé🦙日 本ST\n"), min_size=1, max_size=20),
    ids=st.lists(st.integers(0, 49151), max_size=12),
    stops=st.lists(st.text(st.sampled_from("aé🦙日 S"), min_size=1, max_size=3), max_size=2),
)
def test_streamed_is_not_streamed(engine, text, ids, stops):
    """Of texts, and of tokens in no sensible order."""
    tokenizer = engine.tokenizer
    for tokens in (tokenizer.encode(text), ids):
        whole = tokenizer.decode(tokens)
        ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
        expected = whole[: min(ends)[1]] if ends else whole
        answer, shown = AnswerText(tokenizer, stops, print, frozenset()), ""
        for index, token in enumerate(tokens):
            reason = "length" if index == len(tokens) - 1 else None
            delta = answer.push(Sampled(token), reason)
            shown += delta.text
            if delta.finish_reason == "stop":
                break
        assert shown == expected
