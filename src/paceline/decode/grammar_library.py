"""The one place that knows the library of grammars; without torch, for the process that checks.

The library is llguidance (https://github.com/guidance-ai/llguidance): an Earley parser over a
lexer of derivatives, which tells the tokens that may come next as a mask of bits.
"""

from __future__ import annotations

from typing import Any

from paceline.core.errors import RequestError

_JSON_SPACE = r"[\x20\x0A\x0D\x09]{1,24}"  # without an end to it, weak models never go on
_MAX_LEXER_STATES = 25_000  # of 1 to 2 kB, made as an answer needs them
_ANY_OBJECT = '{"type": "object"}'


def library_tokenizer(tokenizer_json: str, vocab_size: int, eos_ids: list[int]) -> Any:
    """The tokenizer as the library knows it.

    Args:
        tokenizer_json: content of a tokenizer.json.
        vocab_size: bits of a mask.
        eos_ids: tokens that may come where a grammar can end.
    """
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_ids)


def compiled(kind: str, text: str, tokenizer: Any) -> Any:
    """The library's matcher for a grammar, at the beginning of an answer.

    Raises:
        RequestError: the grammar is none, or its lexer and parser exceed the library's bounds.
    """
    import llguidance

    bounds = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
    try:
        matcher = llguidance.LLMatcher(tokenizer, _source(kind, text), limits=bounds, log_level=0)
    except ValueError as error:
        raise _refusal(kind, str(error)) from error
    if matcher.is_error():
        raise _refusal(kind, matcher.get_error())
    return matcher


def first_line(text: str) -> str:
    """Of what the library says; the rest is its state."""
    lines = text.strip().splitlines()
    return lines[0][:300] if lines else "no reason is given"


def _source(kind: str, text: str) -> str:
    from llguidance import LLMatcher, regex_to_lark

    if kind == "regex":
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, use_ascii='dw')}/")
    schema = text if kind == "json" else _ANY_OBJECT
    options: Any = {"whitespace_pattern": _JSON_SPACE, "lenient": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


def _refusal(kind: str, why: str) -> RequestError:
    noun = "regular expression" if kind == "regex" else "JSON schema"
    return RequestError(f"the {noun} cannot be used: {first_line(why)}", param="grammar")
