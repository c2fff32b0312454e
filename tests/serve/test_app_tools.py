"""Tools and formats over HTTP: who may call what, and what an answer must be."""

from __future__ import annotations

import json

import httpx
import pytest
from asking import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    answer,
    chunks,
    error_of,
    grammar_engine,
    live,
    post,
)
from engines import TOKENIZER, Scripted, encode, scripted_engine
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.models.tokenizer import Tokenizer
from paceline.serve.api.formats import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH

pytestmark = pytest.mark.cpu

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>{{ call.function.name }}{{ call.function.arguments | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def knowing(template):
    """The tokenizer of a model that was taught to call tools."""
    return Tokenizer(
        TOKENIZER.backend, eos_ids=TOKENIZER.eos_ids, chat_template=template, special_tokens={}
    )


def tool(name, parameters=None, **more):
    parameters = {"parameters": parameters} if parameters is not None else {}
    return {"type": "function", "function": {"name": name} | parameters | more}


ADD_SCHEMA = {
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
}
TOOLS = [tool("add", ADD_SCHEMA), tool("stop")]
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
STOP = '<tool_call>{"name": "stop", "arguments": {}}</tool_call>'
NAMED = {"type": "function", "function": {"name": "add"}}


class Saying(Scripted):
    """Says what it is told to say."""

    def say(self, text):
        self.ids = TOKENIZER.encode(text + "<|im_end|>")
        self._prompt_ends.clear()


@pytest.fixture(scope="module")
def executor():
    return Saying()


@pytest.fixture(scope="module")
def http(executor):
    engine = scripted_engine(executor)
    engine.tokenizer = knowing(TEMPLATE)
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client


def said(choice):
    """What a choice says, apart from the ids of its calls."""
    message = choice["message"]
    calls = [call["function"] for call in message.get("tool_calls", [])]
    return message["content"], calls, choice["finish_reason"]


def streamed(events):
    text, calls, reason = "", [], None
    for event in events:
        for choice in event["choices"]:
            text += choice["delta"].get("content") or ""
            for call in choice["delta"].get("tool_calls", []):
                assert call["index"] == len(calls)
                assert call["id"].startswith("call_")
                calls.append(call["function"])
            reason = choice["finish_reason"] or reason
    return text, calls, reason


def test_a_model_may_call_tools(http, executor):
    executor.say(f"I add.\n{ADD}\n{STOP}")
    body = answer(http, CHAT, tools=TOOLS, max_tokens=500)
    added = {"name": "add", "arguments": '{"a": 1}'}
    stopped = {"name": "stop", "arguments": "{}"}
    assert said(body["choices"][0]) == ("I add.", [added, stopped], "tool_calls")
    ids = [call["id"] for call in body["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    events = chunks(http, CHAT, tools=TOOLS, max_tokens=500)
    assert streamed(events) == ("I add.", [added, stopped], "tool_calls")


def test_a_model_may_say_something_else(http, executor):
    executor.say("no need")
    for fields in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": False}):
        (choice,) = answer(http, CHAT, tools=TOOLS, **fields)["choices"]
        assert said(choice) == ("no need", [], "stop")
        assert "tool_calls" not in choice["message"]


def test_a_call_alone_has_no_content(http, executor):
    executor.say(ADD)
    message = answer(http, CHAT, tools=TOOLS, max_tokens=500)["choices"][0]["message"]
    assert message["content"] is None


def test_half_a_call_is_text(http, executor):
    executor.say(ADD)
    (choice,) = answer(http, CHAT, tools=TOOLS, max_tokens=20)["choices"]
    assert said(choice) == (ADD[:20], [], "length")


def test_one_call_at_most(http, executor):
    executor.say(f"{ADD}{STOP} and more")
    asked = {"tools": TOOLS, "max_tokens": 500, "parallel_tool_calls": False}
    body = answer(http, CHAT, **asked)
    assert said(body["choices"][0])[1] == [{"name": "add", "arguments": '{"a": 1}'}]
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["usage"]["completion_tokens"] == len(encode(ADD))
    assert streamed(chunks(http, CHAT, **asked)) == ("", said(body["choices"][0])[1], "tool_calls")


def test_with_no_choice_tools_are_not_shown(http, executor):
    executor.say(ADD)
    body = answer(http, CHAT, tools=TOOLS, tool_choice="none", max_tokens=500)
    assert said(body["choices"][0]) == (ADD, [], "stop")
    assert body["usage"]["prompt_tokens"] == len("[user]hi[assistant]")


def test_tools_and_their_answers_are_shown_to_the_model(http, executor):
    executor.say("3")
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    conversation = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "three"}]},
    ]
    asked = {"tools": [tool("add", {}, description="Adds.")], "messages": conversation}
    prompt = (
        '{"type": "function", "function": {"name": "add", "description": "Adds.", '
        '"parameters": {}}}\n<tool_call>[system]Be brief.[user]hi[assistant]'
        '<tool_call>add{"a": 1}</tool_call>[tool]three[assistant]'
    )
    tokens = http.post("/tokenize", json=asked).json()["tokens"]
    assert TOKENIZER.decode(tokens) == prompt
    assert answer(http, CHAT, **asked)["usage"]["prompt_tokens"] == len(tokens)


PIECES = [ADD, STOP, "<tool_call>", "</tool_call>", " ", "\n", "é", "ok", '{"name": "rm"}']


def test_streams_say_what_whole_answers_say(http, executor):
    @settings(deadline=None, max_examples=40)
    @given(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), st.booleans())
    def try_one(text, parallel):
        executor.say(text)
        asked = {"tools": TOOLS, "max_tokens": 500, "parallel_tool_calls": parallel}
        content, calls, reason = said(answer(http, CHAT, **asked)["choices"][0])
        assert streamed(chunks(http, CHAT, **asked)) == (content or "", calls, reason)

    try_one()


BAD_CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "x"}}
REFUSED = [
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rm"}}},
        "tool_choice",
    ),
    ({"tools": [tool("a b")]}, "tools.0.function.name"),
    ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools.2.function.name"),
    ({"tools": [tool("a", strict=True)]}, "tools.0.function.strict"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [tool("a")] * 129}, "tools"),
    ({"tools": [tool("a", 3)]}, "tools.0.function.parameters"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": []}, "functions"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [BAD_CALL]}]},
        "messages.0.tool_calls",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [BAD_CALL]}]},
        "messages.0.tool_calls.0.function.arguments",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.tool_calls"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(http, fields, param):
    error = error_of(post(http, CHAT, **fields))
    assert error["param"] == param
    assert param in error["message"]


@pytest.fixture(scope="module")
def real():
    """A server around a real model that was not taught to call tools."""
    with live(grammar_engine()) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def test_a_model_that_knows_no_tools(real):
    error = error_of(post(real, CHAT, tools=TOOLS))
    assert error["param"] == "tools"
    assert "the chat template of this model knows no tools" in error["message"]
    conversation = [*MESSAGES, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    assert error_of(post(real, CHAT, messages=conversation))["param"] == "messages"
    answer(real, CHAT, tools=TOOLS, tool_choice="none")


def test_calls_that_are_not_json():
    engine = scripted_engine(Saying())
    engine.tokenizer = knowing("{{ tools }}<tool_call><function=x>")
    with live(engine) as address, httpx.Client(base_url=address) as http:
        error = error_of(post(http, CHAT, tools=TOOLS))
    assert error["param"] == "tool_choice"
    assert "not JSON" in error["message"]


# What an answer must be. The models are random: without a grammar they say nothing of the kind.


@pytest.fixture(scope="module")
def calling():
    """A server around a real model with a template that shows tools."""
    engine = grammar_engine()
    engine.tokenizer = knowing("{{ tools | length }} <tool_call>")
    with live(engine) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_call_that_must_be(calling, choice, is_stream):
    tools = [tool("add", ADD_SCHEMA, strict=True)]
    for seed in range(3):
        asked = {"tools": tools, "tool_choice": choice, "seed": seed, "max_tokens": 400}
        if is_stream:
            content, calls, reason = streamed(chunks(calling, CHAT, **asked))
        else:
            content, calls, reason = said(answer(calling, CHAT, **asked)["choices"][0])
        assert not content
        ((call),) = calls
        arguments = json.loads(call["arguments"])
        assert call["name"] == "add"
        assert arguments["a"] in range(10)
        assert arguments["b"] in ("x", "y")
        assert reason == ("tool_calls" if choice == "required" else "stop")


def test_json_of_a_schema(real):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    asked = {"response_format": wanted, "max_tokens": 100}
    (choice,) = answer(real, CHAT, seed=1, **asked)["choices"]
    assert json.loads(choice["message"]["content"])["n"] in (1, 2)
    assert choice["finish_reason"] == "stop"
    text, _, _ = streamed(chunks(real, CHAT, seed=1, **asked))
    assert text == choice["message"]["content"]
    for outputs in ({"json": schema}, {"json": json.dumps(schema)}):
        body = answer(real, COMPLETIONS, structured_outputs=outputs, max_tokens=100)
        assert json.loads(body["choices"][0]["text"])["n"] in (1, 2)


def test_what_a_regular_expression_matches(real):
    asked = {"structured_outputs": {"regex": "(yes|no){2}"}, "max_tokens": 100, "n": 3}
    for choice in answer(real, COMPLETIONS, **asked)["choices"]:
        assert choice["text"] in ("yesyes", "yesno", "noyes", "nono")


def test_any_text(real):
    plain = answer(real, CHAT, seed=3)["choices"]
    assert answer(real, CHAT, seed=3, response_format={"type": "text"})["choices"] == plain


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


def schema_format(schema, **more):
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": schema} | more,
        }
    }


SCHEMA = "response_format.json_schema.schema"
BAD_FORMATS = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (schema_format({}, name="a b"), "response_format.json_schema.name"),
    (
        {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
        "response_format.json_schema",
    ),
    (schema_format(nested(MAX_SCHEMA_DEPTH + 1)), SCHEMA),
    (schema_format({"enum": ["x" * MAX_SCHEMA_BYTES]}), SCHEMA),
    (schema_format({"type": "no such type"}), "response_format"),
    (schema_format([]), SCHEMA),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "x" * 5000}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    (schema_format({}) | {"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    (schema_format({}) | {"ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FORMATS, ids=range(len(BAD_FORMATS)))
def test_formats_that_cannot_be(real, fields, param):
    error = error_of(post(real, CHAT, **fields))
    assert error["param"] == param


def test_a_schema_that_is_nested_too_deep_to_read(real):
    """Deeper than whoever reads JSON can follow."""
    depth = 50_000
    schema = '{"not": ' * depth + "{}" + "}" * depth
    form = f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'
    body = f'{{"model": "tiny", "messages": [], "response_format": {form}}}'
    headers = {"content-type": "application/json"}
    error_of(real.post(CHAT, content=body.encode(), headers=headers))
