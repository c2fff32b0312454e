"""Calls of tools in a model's text: what is one, what stays text, whatever the pieces."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paceline.serve.api.tool_reading import (
    READERS,
    Call,
    Found,
    JsonReader,
    TaggedReader,
    reader_for,
)

NAMES = {"add", "look_up"}
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
WORD = '{"word": "</tool_call> <tool_call>é"}'
LOOK = f'<tool_call>{{"name": "look_up", "arguments": {WORD}}}</tool_call>'
ADDED = Call("add", '{"a": 1, "b": [2]}')
LOOKED = Call("look_up", WORD)


def read(reader, pieces):
    found = [*(reader.push(piece) for piece in pieces), reader.finish()]
    text = "".join(one.text for one in found)
    return Found(text, tuple(call for one in found for call in one.calls))


TAGGED = [
    ("", "", []),
    (" no call \n", " no call \n", []),
    (ADD, "", [ADDED]),
    (f"\n{ADD}\n", "", [ADDED]),
    (f"I add.\n\n{ADD}\n{LOOK} ", "I add.", [ADDED, LOOKED]),
    (f"{ADD}\n done. ", "done. ", [ADDED]),
    (f"{ADD}a\n {LOOK}\nb", "ab", [ADDED, LOOKED]),
    ("a < b <tool", "a < b <tool", []),
    ("<tool_call>{}</tool_call> x", "<tool_call>{}</tool_call> x", []),
    ("<tool_call>not JSON</tool_call>" + ADD, "<tool_call>not JSON</tool_call>", [ADDED]),
    ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": ["add"], "arguments": {}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "add", "arguments": 3}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "add", "arguments": "{}"}</tool_call>', "", [Call("add", "{}")]),
    ('<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>',) * 2 + ([],),
    ('<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>',) * 2 + ([],),
    (f'<tool_call>{{"name": "add", "arguments": {{"a": {"1" * 5000}}}}}</tool_call>',) * 2 + ([],),
    (
        '<tool_call>{"name": "add", "arguments": {"a": "1\n2"}}</tool_call>',
        "",
        [Call("add", '{"a": "1\\n2"}')],
    ),
    ('<tool_call>{"name": "add", "argum',) * 2 + ([],),
    ('<tool_call>{"name": "add</tool_call> ',) * 2 + ([],),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>",) * 2 + ([],),
    (f"<tool_call>{ADD}", f"<tool_call>{ADD}", []),
]


@pytest.mark.parametrize(("text", "shown", "calls"), TAGGED, ids=range(len(TAGGED)))
def test_tagged_calls(text, shown, calls):
    assert read(TaggedReader(NAMES), [text]) == (shown, tuple(calls))
    assert read(TaggedReader(NAMES), text) == (shown, tuple(calls))  # one character at a time


JSON = [
    ("", "", []),
    (" \n", " \n", []),
    ("plain", "plain", []),
    (' {"name": "add", "parameters": {"a": 1, "b": [2]}}\n', "", [ADDED]),
    ('{"name": "add", "arguments": {}} and more',) * 2 + ([],),
    ('{"name": "rm", "arguments": {}}',) * 2 + ([],),
    ('[{"name": "add"}, {"name": "add", "arguments": {"a": 1, "b": [2]}}]', "", 2),
    ('[{"name": "add"}, {"name": "rm"}]',) * 2 + ([],),
    ("[]", "[]", []),
    ('{"name": "add", "arg',) * 2 + ([],),
]


@pytest.mark.parametrize(("text", "shown", "calls"), JSON, ids=range(len(JSON)))
def test_calls_that_are_the_whole_answer(text, shown, calls):
    calls = [Call("add", "{}"), ADDED] if calls == 2 else calls
    assert read(JsonReader(NAMES), [text]) == (shown, tuple(calls))
    assert read(JsonReader(NAMES), text) == (shown, tuple(calls))


PARTS = ["<tool_call>", "</tool_call>", "<", "tool_call>", " ", "\n", "{", "}", '"', "a", "é"]
PARTS += [ADD, LOOK, '{"name": "add", "arguments": {}}', '{"name": "add"']


@given(
    st.sampled_from(list(READERS.values())),
    st.lists(st.sampled_from(PARTS), max_size=8).map("".join),
    st.lists(st.integers(0, 300), max_size=8),
)
@example(TaggedReader, f"a {ADD} b", [1, 2, 5, 15, 30, 60])
def test_no_split_changes_what_is_read(reader, text, cuts):
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    whole = read(reader(NAMES), [text])
    assert read(reader(NAMES), pieces) == whole
    for call in whole.calls:
        assert call.name in NAMES
        assert isinstance(json.loads(call.arguments), dict)


@given(st.text(max_size=30))
def test_text_without_calls_is_text(text):
    for reader in READERS.values():
        assert read(reader(NAMES), text) == (text, ())


def test_text_comes_as_soon_as_it_can():
    reader = TaggedReader(NAMES)
    assert reader.push("one two ").text == "one two"
    assert reader.push("three <tool").text == " three"
    assert reader.push("box ").text == " <toolbox"
    assert reader.push(ADD).calls == (ADDED,)


def test_how_a_template_s_calls_are_read():
    assert reader_for("{{ tools }} <tool_call> {{ call }} </tool_call>") is TaggedReader
    assert reader_for("{{ tools | tojson }} ipython") is JsonReader
    assert reader_for("<tool_call>\n<function=add>\n<parameter=a>") is None
