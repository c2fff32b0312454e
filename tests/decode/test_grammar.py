"""Grammars: what they allow is what may be sampled, and their state follows the answer."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar, GrammarMask, Grammars
from paceline.decode.processors import DeadEndError, History
from paceline.decode.sampler import Draw, Refused, Sampler, SamplingParams
from paceline.models.tokenizer import byte_tokenizer

pytestmark = pytest.mark.cpu

TOKENIZER = byte_tokenizer()
V = 272  # more logits than tokens, as models have
GRAMMARS = Grammars(TOKENIZER, V)
ZEROS = torch.zeros(V, dtype=torch.float64)
END = set(TOKENIZER.eos_ids)


def encode(text):
    return TOKENIZER.encode(text)


def allowed(mask, text, prompt="ask: "):
    """The texts of the tokens that may come after an answer's beginning; "" for its end."""
    prompt_ids = encode(prompt)
    history = History([*prompt_ids, *encode(text)], len(prompt_ids))
    tokens = mask(ZEROS, history).isfinite().nonzero()[:, 0].tolist()
    return {TOKENIZER.decode([token]) for token in tokens}


def answer(grammar, seed, *, max_tokens=400, temperature=1.0, **options):
    """What a model of no opinion says, and whether it came to an end."""
    sampler, prompt_ids = Sampler(GRAMMARS), encode("say: ")
    tokens = list(prompt_ids)
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(temperature=temperature, seed=seed, **options)
    while len(tokens) < len(prompt_ids) + max_tokens:
        draw = Draw(params, len(tokens), tokens, len(prompt_ids), grammar=grammar)
        logits_1V = torch.randn(1, V, generator=generator)
        found = sampler.sample(logits_1V, {1: draw})[1]
        assert not isinstance(found, Refused), found
        if found.token in END:
            return TOKENIZER.decode(tokens[len(prompt_ids) :]), True
        tokens.append(found.token)
    return TOKENIZER.decode(tokens[len(prompt_ids) :]), False


def test_a_mask_by_hand():
    mask = GrammarMask(GRAMMARS, Grammar("regex", "[ab]{2}(c|é)?"))
    assert allowed(mask, "") == {"a", "b"}
    assert allowed(mask, "a") == {"a", "b"}
    at_end = mask(ZEROS, History([1, *encode("ab")], 1)).isfinite().nonzero()[:, 0].tolist()
    assert set(at_end) == END | {encode("c")[0], encode("é")[0]}
    after = mask(ZEROS, History([1, *encode("abc")], 1)).isfinite().nonzero()[:, 0].tolist()
    assert set(after) == END


def test_it_follows_an_answer_that_grows_by_several_and_is_cut_back():
    mask = GrammarMask(GRAMMARS, Grammar("regex", "one(two|three)"))
    assert allowed(mask, "onet") == {"w", "h"}
    assert allowed(mask, "onethr") == {"e"}
    assert allowed(mask, "on") == {"e"}
    assert allowed(mask, "onetw") == {"o"}
    assert allowed(mask, "") == {"o"}


def test_masks_of_one_grammar_do_not_know_each_other():
    first, second = (GrammarMask(GRAMMARS, Grammar("regex", "abc")) for _ in range(2))
    assert allowed(first, "ab") == {"c"}
    assert allowed(second, "") == {"a"}


def test_what_was_not_allowed_is_a_dead_end():
    mask = GrammarMask(GRAMMARS, Grammar("regex", "abc"))
    with pytest.raises(DeadEndError, match="the grammar cannot go on"):
        allowed(mask, "ax")
    with pytest.raises(DeadEndError):
        allowed(mask, "axy")


def test_a_dead_end_is_this_rows_alone():
    """A grammar whose only way on is a token that the model cannot say."""
    sampler = Sampler(GRAMMARS)
    logits_RV = torch.zeros(2, V)
    logits_RV[0, encode("b")[0]] = -torch.inf
    greedy = SamplingParams(temperature=0)
    tokens = encode("?a")
    draws = {
        1: Draw(greedy, 2, tokens, 1, grammar=Grammar("regex", "abc")),
        2: Draw(greedy, 2, tokens, 1, grammar=Grammar("regex", "abc")),
    }
    found = sampler.sample(logits_RV, draws)
    assert isinstance(found[1], Refused)
    assert "no token" in found[1].why
    assert found[2].token == encode("b")[0]


REGEXES = [
    "[a-z]{3,9}",
    "(yes|no|perhaps)",
    r"\d{4}-\d{2}-\d{2}",
    r"[A-Z][a-z]{1,8}( [A-Z][a-z]{1,8}){0,3}\.",
    "(é|ß|日本|🦙){1,4}",
    r"\w{1,5}@\w{1,5}\.(com|org)",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_the_regular_expression(regex):
    for seed in range(12):
        text, has_ended = answer(Grammar("regex", regex), seed)
        assert has_ended
        assert re.fullmatch(regex, text), text


def schemas():
    """Small JSON schemas whose values are bounded."""
    leaf = st.sampled_from(
        [
            {"type": "integer", "minimum": -5, "maximum": 40},
            {"type": "boolean"},
            {"type": "null"},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{1,3}$"},
            {"enum": ["red", "green", 3, None]},
            {"const": 'x"y'},
        ]
    )

    def grown(inner):
        names = st.lists(st.sampled_from(["a", "b", "é", 'q"']), max_size=3, unique=True)
        objects = names.flatmap(
            lambda keys: st.tuples(
                st.tuples(*(inner for _ in keys)), st.sets(st.sampled_from(keys or ["a"]))
            ).map(
                lambda made: {
                    "type": "object",
                    "properties": dict(zip(keys, made[0], strict=True)),
                    "required": sorted(made[1] & set(keys)),
                    "additionalProperties": False,
                }
            )
        )
        arrays = inner.map(lambda items: {"type": "array", "items": items, "maxItems": 3})
        return (
            objects | arrays | st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x})
        )

    return st.recursive(leaf, grown, max_leaves=5)


def validates(schema, value):
    """A judge of our own, of these schemas alone; that of the tests is independent of it."""
    if "anyOf" in schema:
        return any(validates(one, value) for one in schema["anyOf"])
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    if "const" in schema:
        return value == schema["const"]
    match schema["type"]:
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            is_short = isinstance(value, str) and len(value) <= schema.get("maxLength", 99)
            return is_short and bool(re.search(schema.get("pattern", ""), value))
        case "array":
            is_short = isinstance(value, list) and len(value) <= schema["maxItems"]
            return is_short and all(validates(schema["items"], one) for one in value)
        case "object":
            properties = schema["properties"]
            is_closed = isinstance(value, dict) and set(value) <= set(properties)
            has_all = is_closed and set(schema["required"]) <= set(value)
            return has_all and all(validates(properties[key], one) for key, one in value.items())
    raise AssertionError(schema)


@settings(deadline=None, max_examples=60)
@given(schemas(), st.integers(0, 1000))
def test_answers_satisfy_the_json_schema(schema, seed):
    text, has_ended = answer(Grammar("json", json.dumps(schema)), seed, max_tokens=1500)
    assert has_ended
    assert validates(schema, json.loads(text)), (schema, text)


def test_any_json_object():
    num_ended = 0
    for seed in range(10):
        text, has_ended = answer(Grammar("json-object"), seed, max_tokens=600)
        assert text.startswith("{")
        if has_ended:
            num_ended += 1
            assert isinstance(json.loads(text), dict)
    assert num_ended > 3


def test_with_all_else_that_a_sampler_does():
    options = {"top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    for temperature in (0.0, 1.5):
        for seed in range(4):
            text, has_ended = answer(
                Grammar("regex", REGEXES[3]), seed, temperature=temperature, **options
            )
            assert has_ended
            assert re.fullmatch(REGEXES[3], text)


def test_min_tokens_end_where_the_grammar_does():
    """A grammar that can go on goes on; one that cannot ends the answer all the same."""
    sampler, end_ids = Sampler(GRAMMARS), tuple(sorted(END))
    greedy = SamplingParams(temperature=0)
    logits_1V = torch.zeros(1, V)
    logits_1V[0, list(END)] = 9.0

    def next_token(number, regex, text):
        tokens = encode("?" + text)
        draw = Draw(greedy, len(tokens), tokens, 1, None, 4, end_ids, Grammar("regex", regex))
        return sampler.sample(logits_1V, {number: draw})[number].token

    assert next_token(1, "a*", "aa") == encode("a")[0]
    assert next_token(2, "a*", "aaaa") in END
    assert next_token(3, "a{0,2}", "aa") in END


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("regex", "[a-"), "regular expression cannot be used"),
        (Grammar("json", "no JSON"), "JSON schema cannot be used"),
        (Grammar("json", '{"type": "strng"}'), "JSON schema cannot be used"),
        (Grammar("json", '{"$ref": "https://example.org/schema"}'), "JSON schema cannot be used"),
        (Grammar("json", '{"type": "array", "uniqueItems": true}'), "uniqueItems"),
    ],
    ids=str,
)
def test_what_is_no_grammar(grammar, message):
    with pytest.raises(RequestError, match=message) as caught:
        GRAMMARS.compiled(grammar)
    assert caught.value.param == "grammar"
    assert len(caught.value.message) < 500


def test_a_schema_cannot_loosen_its_reading():
    schema = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    with pytest.raises(RequestError, match="uniqueItems"):
        GRAMMARS.compiled(Grammar("json", json.dumps(schema)))
