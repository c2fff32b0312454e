"""``load`` gives the model, ``Engine`` its answers."""

from __future__ import annotations

import json

import pytest
import torch

import paceline as pl
from paceline.core.errors import RequestError, UnknownNameError, UsageError
from paceline.models.hub import resolve
from paceline.models.peft.attach import attach
from paceline.models.peft.files import write_adapter
from paceline.models.weights import build

pytestmark = pytest.mark.cpu

MODEL = "random:llama:tiny"


@pytest.fixture(scope="module")
def engine() -> pl.Engine:
    return pl.Engine(MODEL, pl.Plan(serve=pl.ServeConfig(dtype="float32")))


@torch.no_grad()
def test_a_loaded_model_is_a_plain_module():
    loaded = pl.load(MODEL, dtype="float64")
    tokens_BT = torch.tensor([loaded.tokenizer.encode("around and around")])
    logits_BTV = loaded.model(tokens_BT)
    assert logits_BTV.shape == (1, 17, loaded.spec.vocab_size)
    assert logits_BTV.dtype == torch.float64
    assert not loaded.model.training
    assert sum(p.numel() for p in loaded.model.parameters()) == loaded.spec.num_parameters
    # Causal, and the same again.
    assert torch.equal(loaded.model(tokens_BT[:, :5]), loaded.model(tokens_BT[:, :5]))
    assert float((loaded.model(tokens_BT[:, :5]) - logits_BTV[:, :5]).abs().max()) <= 1e-12


def test_what_cannot_be_loaded():
    with pytest.raises(UsageError, match="unknown dtype 'int8'"):
        pl.load(MODEL, dtype="int8")
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        pl.load(MODEL, device="tpu")
    with pytest.raises(UnknownNameError, match="smollm-135m"):
        pl.load("smollm-135m")


def test_greedy_answers_are_the_models(engine):
    loaded = pl.load(MODEL, dtype="float32")
    ids = loaded.tokenizer.encode("pace")
    answer = engine.generate("pace", max_tokens=5)[0]
    with torch.no_grad():
        for token in answer.token_ids:
            assert token == int(loaded.model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
    assert len(ids) == 4 + len(answer.token_ids)
    assert answer.finish_reason in ("length", "stop")


def test_an_answer_does_not_depend_on_the_list(engine):
    sampling = {"max_tokens": 6, "temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 5}
    ids = engine.tokenizer.encode("line")
    together = engine.generate(["pace", ids, "pace"], **sampling)
    assert together[0] == together[2] == engine.generate("pace", **sampling)[0]
    assert (
        together[1] == engine.generate("line", **sampling)[0] == engine.generate(ids, **sampling)[0]
    )
    others = {engine.generate("pace", **sampling | {"seed": n})[0].text for n in range(4)}
    assert len(others) > 1
    assert engine.generate([]) == []


def test_stop_texts_end_an_answer(engine):
    whole = engine.generate("pace", max_tokens=8)[0]
    cut = whole.text[:1]
    answer = engine.generate("pace", max_tokens=8, stop=cut)[0]
    assert (answer.text, answer.finish_reason) == ("", "stop")
    assert engine.generate("pace", max_tokens=8, stop=["\0never", cut])[0] == answer


def test_a_chat_is_its_template(engine):
    answer = engine.chat([{"role": "user", "content": "who rides?"}], max_tokens=4)
    prompt = "<|im_start|>user\nwho rides?<|im_end|>\n<|im_start|>assistant\n"
    assert answer == engine.generate(prompt, max_tokens=4)[0]


def test_an_adapter_answers_by_its_name(tmp_path):
    source = resolve(MODEL)
    config = pl.PeftConfig(method="ia3")
    added = attach(build(source.spec), config, source.weights)
    tensors = {name: -added.weights.read(name) for name in added.added}
    write_adapter(tmp_path, source.spec, config, MODEL, tensors)
    serve = pl.ServeConfig(dtype="float32", adapters={"ada": str(tmp_path)})
    both, merged = pl.Engine(MODEL, pl.Plan(serve=serve)), pl.Engine(tmp_path)
    sampling = {"max_tokens": 6, "temperature": 1.0, "seed": 1}
    assert both.generate("pace", **sampling, adapter="ada") == merged.generate("pace", **sampling)
    assert both.generate("pace", **sampling) != merged.generate("pace", **sampling)
    messages = [{"role": "user", "content": "who rides?"}]
    assert both.chat(messages, **sampling, adapter="ada") == merged.chat(messages, **sampling)
    with pytest.raises(RequestError, match="no adapter 'eve'"):
        both.generate("pace", adapter="eve")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1, "top_p": 2.0}, "top_p = 2.0.*top_k = -1"),
    ],
)
def test_sampling_out_of_range(engine, options, message):
    with pytest.raises(UsageError, match=message):
        engine.generate("pace", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "unknown key 'temprature'"),
        ({"max_tokens": "5"}, 'max_tokens = "5": must be a whole number'),
        ({"stop": 5}, "a text or a list of texts"),
        ({"regex": "a", "json_object": True}, "three ways"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
    ],
)
def test_options_that_are_none(engine, options, message):
    with pytest.raises(UsageError, match=message):
        engine.generate("pace", **options)


def test_log_probabilities(engine):
    (answer,) = engine.generate("pace", max_tokens=3, logprobs=2, prompt_logprobs=0)
    assert tuple(one.token for one in answer.logprobs) == answer.token_ids
    assert all(one.top[0] == (one.token, one.logprob) for one in answer.logprobs)  # greedy
    assert [one.token for one in answer.prompt_logprobs] == engine.tokenizer.encode("pace")[1:]
    (plain,) = engine.generate("pace", max_tokens=3)
    assert (plain.token_ids, plain.logprobs) == (answer.token_ids, ())


def test_what_an_answer_must_be(engine):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    (answer,) = engine.generate("pace", json_schema=schema, temperature=1.0, seed=2)
    assert json.loads(answer.text) == {"a": 1}
    assert engine.generate("pace", regex="x{3}")[0].text == "xxx"
    token = engine.tokenizer.encode("y")[0]
    answer = engine.chat(
        [{"role": "user", "content": "z"}],
        logit_bias={token: 100.0},
        max_tokens=4,
        stop_token_ids=(token,),
        min_tokens=2,
    )
    assert answer.token_ids[-1] == token
    assert len(answer.token_ids) == 3
    with pytest.raises(RequestError, match="the regular expression cannot be used"):
        engine.generate("pace", regex="(")


def test_a_prompt_that_cannot_be_answered(engine):
    with pytest.raises(RequestError, match="the prompt is empty"):
        engine.generate(["pace", ""])
    with pytest.raises(RequestError, match="token ids must be from 0 to 258"):
        engine.generate([1, 999])
    with pytest.raises(pl.ConfigError, match=r"serve\.mesh\.tp"):
        pl.Engine(MODEL, pl.Plan.from_dict({"serve": {"mesh": {"tp": 2}}}))
