"""What a request asks of sampling, through the engine: the same whatever else runs."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from engines import (
    SPEC,
    TOKENIZER,
    Listener,
    Scripted,
    ask,
    encode,
    real_engine,
    scripted_engine,
    serving,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar, Grammars
from paceline.decode.grammar_check import GrammarCheck
from paceline.decode.sampler import SamplingParams
from paceline.serve.engine import Engine, join
from paceline.serve.executor.base import StepResult
from paceline.serve.executor.local import LocalExecutor
from paceline.serve.load import BLOCK_SIZE
from paceline.serve.schedule.base import Budget
from paceline.serve.schedule.stall_free import stall_free

pytestmark = pytest.mark.cpu

END = set(TOKENIZER.eos_ids)


@pytest.fixture(scope="module")
def checked():
    """Grammars of the tiny model, and what checks them."""
    grammars = Grammars(TOKENIZER, SPEC.vocab_size)
    return grammars, GrammarCheck(grammars)


def engine_of(checked, **options):
    """The tiny model's engine, with grammars."""
    grammars, check = checked
    plain = real_engine(**options)
    inner = plain._executor
    executor = LocalExecutor(inner._model, inner.num_blocks, BLOCK_SIZE, grammars)
    budget = Budget(options.get("max_batch_tokens", 512), options.get("max_sequences", 8))
    return Engine(executor, stall_free, budget, plain.spec, TOKENIZER, grammars=check)


def asks():
    """Requests that ask for all there is, each of another thing."""
    sampling = [
        SamplingParams(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, seed=1),
        SamplingParams(temperature=0, presence_penalty=0.6, frequency_penalty=0.4),
        SamplingParams(temperature=1.2, repetition_penalty=1.3, seed=2),
        SamplingParams(temperature=1.0, logit_bias=((97, 3.0), (98, -50.0)), seed=3),
        SamplingParams(temperature=0.7, seed=4),
    ]
    made = [replace(ask("a prompt, " * 4, max_tokens=24), sampling=one) for one in sampling]
    made.append(replace(made[0], min_tokens=24, num_logprobs=3))
    made.append(replace(made[2], num_prompt_logprobs=2, num_logprobs=0))
    made.append(replace(made[4], grammar=Grammar("regex", "[a-f]{5,30}"), stop=("ff",)))
    made.append(
        replace(made[1], grammar=Grammar("json", '{"type": "array", "items": {"enum": [1, 22]}}'))
    )
    return made


@pytest.fixture(scope="module")
def alone(checked):
    """Each answered by an engine that has answered nothing else."""
    return [engine_of(checked).generate([request])[0] for request in asks()]


def assert_same(found, expected):
    """The same answers; log-probabilities are of logits that may differ in their last bit."""
    for one, other in zip(found, expected, strict=True):
        assert without_logprobs(one) == without_logprobs(other)
        for name in ("logprobs", "prompt_logprobs"):
            mine, theirs = getattr(one, name), getattr(other, name)
            assert [x.token for x in mine] == [x.token for x in theirs]
            assert [x.logprob for x in mine] == pytest.approx([x.logprob for x in theirs], abs=1e-5)


def without_logprobs(answer):
    return replace(answer, logprobs=(), prompt_logprobs=())


def test_all_at_once_equal_alone(alone, checked):
    assert_same(engine_of(checked).generate(asks()), alone)
    assert_same(engine_of(checked).generate(asks()[::-1]), alone[::-1])


@pytest.mark.parametrize("max_batch_tokens", [1, 5])
def test_in_chunks_equal_whole(alone, checked, max_batch_tokens):
    assert_same(engine_of(checked, max_batch_tokens=max_batch_tokens).generate(asks()), alone)


def test_preempted_equal_not(alone, checked):
    """Few blocks: what is taken away is computed again, the state of sampling too."""
    engine = engine_of(checked, num_blocks=12)
    found = engine.generate(asks())
    assert engine.book.num_preempted > 0
    assert_same(found, alone)


def test_streams_of_one_seed_differ_and_repeat(checked):
    request = asks()[0]
    streams = [
        replace(request, sampling=replace(request.sampling, stream=number)) for number in range(4)
    ]
    together = engine_of(checked).generate(streams)
    assert together == [engine_of(checked).generate([one])[0] for one in streams]
    assert len({answer.token_ids for answer in together}) == 4


# The length of an answer.


def test_min_tokens():
    plain = real_engine().generate([ask(seed=seed, max_tokens=40) for seed in range(20)])
    short = [seed for seed, answer in enumerate(plain) if len(answer.token_ids) < 20]
    assert short
    longer = real_engine().generate(
        [ask(seed=seed, max_tokens=40, min_tokens=20) for seed in range(20)]
    )
    for seed, answer in enumerate(longer):
        assert len(answer.token_ids) >= 20
        assert not END & set(answer.token_ids[:20])
        if seed not in short:
            assert answer == plain[seed]


def test_stop_strings_are_looked_for_after_the_least_length():
    says = "a STOP b STOP c"
    answer = scripted_engine(Scripted(says)).generate([ask(stop=("STOP",), min_tokens=6)])[0]
    assert answer.text == "a STOP b "
    assert answer.finish_reason == "stop"
    answer = scripted_engine(Scripted(says)).generate([ask(stop=("STOP",), min_tokens=5)])[0]
    assert answer.text == "a STOP b "  # the last letter came after it, its beginning before
    answer = scripted_engine(Scripted(says)).generate([ask(stop=("STOP",), min_tokens=2)])[0]
    assert answer.text == "a "


# Streamed equals not streamed.


@settings(deadline=None, max_examples=150)
@given(
    st.text(st.sampled_from("aé🦙日ST"), min_size=1, max_size=14),
    st.lists(st.text(st.sampled_from("aé🦙ST"), min_size=1, max_size=3), max_size=2),
    st.integers(1, 40),
    st.booleans(),
)
def test_parts_join_to_the_whole(text, stops, max_tokens, has_thread):
    """Tokens are bytes: characters and stop strings come in pieces, and the engine runs on."""
    whole = TOKENIZER.decode(encode(text)[:max_tokens])
    if len(encode(text)) < max_tokens:
        whole += "a" * (max_tokens - len(encode(text)))
    ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
    expected = whole[: min(ends)[1]] if ends else whole
    engine, listener = scripted_engine(Scripted(text)), Listener()
    request = ask(stop=tuple(stops), max_tokens=max_tokens)
    if has_thread:
        with serving(engine):
            engine.submit(request, listener)
            listener.wait_for_end()
    else:
        engine.submit(request, listener)
        engine.drain()
    answer = join(listener.deltas)
    assert answer.text == listener.text == expected
    assert answer.finish_reason == ("stop" if ends else "length")
    shown = TOKENIZER.decode(answer.token_ids)
    if ends:  # counted up to the token that completes the stop string, and no further
        assert any(stop in shown for stop in stops)
        before = TOKENIZER.decode(answer.token_ids[:-1])
        assert len(answer.token_ids) == max_tokens or not any(stop in before for stop in stops)
    assert sum(delta.finish_reason is not None for delta in listener.deltas) == 1


# Log-probabilities.


def reference_logprobs(tokens):
    """Of every token but the first, by the whole model at once, in float64."""
    from engines import _model

    with torch.no_grad():
        return _model()(torch.tensor([tokens]))[0].double().log_softmax(-1)


@pytest.mark.parametrize("max_batch_tokens", [512, 7, 1])
def test_log_probabilities_of_prompt_and_answer(max_batch_tokens):
    request = ask("the prompt of forty letters, or so it is", seed=3, max_tokens=10)
    request = replace(request, num_logprobs=4, num_prompt_logprobs=2)
    mates = [ask("x" * 30, seed=5), replace(request, num_prompt_logprobs=0)]
    engine = real_engine(max_batch_tokens=max_batch_tokens)
    answer, _, twin = engine.generate([request, *mates])
    tokens = [*request.prompt_ids, *answer.token_ids]
    expected_TV = reference_logprobs(tokens)
    told = [*answer.prompt_logprobs, *answer.logprobs]
    assert [one.token for one in told] == tokens[1:]
    for index, one in enumerate(told):
        assert one.logprob == pytest.approx(float(expected_TV[index, one.token]), abs=2e-5)
        num_top = 2 if index < len(request.prompt_ids) - 1 else 4
        values = expected_TV[index].topk(num_top).values.tolist()
        assert [value for _, value in one.top] == pytest.approx(values, abs=2e-5)
    assert [one.top for one in twin.prompt_logprobs] == [()] * (len(request.prompt_ids) - 1)


def test_a_prompt_that_is_scored_finds_nothing_and_is_found():
    engine = real_engine()
    request = replace(ask("y" * 50, max_tokens=2), num_prompt_logprobs=0)
    first = engine.generate([request])[0]
    assert engine.book.num_found_tokens == 0
    assert engine.generate([request])[0] == first
    assert engine.book.num_found_tokens == 0
    engine.generate([ask("y" * 50, max_tokens=2)])
    assert engine.book.num_found_tokens == 48


def test_a_prompt_of_one_token_has_nothing_to_score():
    answer = real_engine().generate([replace(ask("y"), num_prompt_logprobs=1)])[0]
    assert answer.prompt_logprobs == ()


# Grammars.


def test_grammars_through_the_engine(alone):
    letters, array = alone[-2:]
    assert re.fullmatch("[a-f]{1,30}", letters.text)
    assert "ff" not in letters.text
    assert array.text.startswith("[")
    if array.finish_reason == "stop":
        assert set(json.loads(array.text)) <= {1, 22}


def test_a_dead_end_ends_its_request_alone():
    class Refusing(Scripted):
        def run(self, step):
            found = super().run(step)
            first = min(found.sampled, default=None)
            if len(self.steps) != 3 or first is None:
                return found
            found.sampled.pop(first)
            return StepResult(found.sampled, {first: "the grammar allows no token here"})

    executor = Refusing()
    engine = Engine(executor, stall_free, Budget(64, 4), SPEC, TOKENIZER)
    failed, fine = engine.generate([ask(max_tokens=6), ask(max_tokens=6)])
    assert failed.finish_reason == "error"
    assert failed.error == "the grammar allows no token here"
    assert (len(fine.token_ids), fine.finish_reason) == (6, "length")


def test_a_bad_grammar_is_refused_and_others_go_on(checked):
    engine = engine_of(checked)
    with pytest.raises(RequestError, match="regular expression cannot be used"):
        engine.submit(ask(grammar=Grammar("regex", "(")), Listener())
    with pytest.raises(RequestError, match="this engine knows no grammars"):
        real_engine().generate([ask(grammar=Grammar("json-object"))])
    assert engine.generate([ask(seed=7)]) == real_engine().generate([ask(seed=7)])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"min_tokens": 21}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"num_logprobs": 101}, "num_logprobs"),
        ({"num_prompt_logprobs": 101}, "num_prompt_logprobs"),
        ({"ignore_eos": True, "grammar": Grammar("json-object")}, "ignore_eos"),
        *(
            ({"sampling": SamplingParams(**{name: value})}, name)
            for name, value in [
                ("temperature", float("nan")),
                ("temperature", -1.0),
                ("temperature", float("inf")),
                ("top_p", 0.0),
                ("top_p", 1.1),
                ("top_k", -1),
                ("min_p", -0.1),
                ("min_p", 1.1),
                ("presence_penalty", float("inf")),
                ("frequency_penalty", float("nan")),
                ("repetition_penalty", 0.0),
                ("logit_bias", ((259, 1.0),)),
                ("logit_bias", ((3, float("nan")),)),
            ]
        ),
    ],
    ids=str,
)
def test_what_is_refused(changes, param):
    with pytest.raises(RequestError) as caught:
        real_engine().generate([replace(ask(), **changes)])
    assert caught.value.param == param
