"""What a person asks of an answer, in flags, in Python and in lines of a file alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from paceline.core.errors import UnknownNameError, UsageError
from paceline.decode.grammar import Grammar
from paceline.decode.sampler import SamplingParams
from paceline.serve.request import Request
from paceline.serve.servable import sampling_faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a prompt is answered; the names are those of `SamplingParams` and `Request`.

    Attributes:
        logprobs: likeliest tokens that are told of with each token; None for no log-probabilities.
        prompt_logprobs: the same for the prompt.
        stop_token_ids: tokens that end the answer beside the model's own.
        grammar: what the answer's text must be.
        adapter: that answers, of those beside the model; empty for none.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    adapter: str = ""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
        )

    def request(self, prompt_ids: Sequence[int]) -> Request:
        """The engine's request."""
        return Request(
            prompt_ids=tuple(prompt_ids),
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            stop_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            num_logprobs=self.logprobs,
            num_prompt_logprobs=self.prompt_logprobs,
            grammar=self.grammar,
            adapter=self.adapter,
        )


def require_in_range(options: Options, *, flags: bool = False) -> None:
    """Raises UsageError for numbers out of range, all of them at once.

    Args:
        options: that are asked.
        flags: whether they are named as flags.
    """
    faults = sampling_faults(options.sampling)
    if faults:
        named = [(f"--{name.replace('_', '-')}" if flags else name, why) for name, why in faults]
        raise UsageError("; ".join(f"{name} = {why}" for name, why in named))


def grammar_of(json_schema: Any = None, regex: str | None = None, json_object: bool = False) -> Any:
    """The one grammar that is asked for, or None.

    Args:
        json_schema: as JSON or as what JSON holds.
        regex: that matches the whole answer.
        json_object: whether any JSON object is wanted.

    Raises:
        UsageError: more than one is asked for.
    """
    found: list[Grammar] = []
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema)
        found.append(Grammar("json", text))
    if regex is not None:
        found.append(Grammar("regex", regex))
    if json_object:
        found.append(Grammar("json-object"))
    if len(found) > 1:
        raise UsageError("json_schema, regex and json_object are three ways to ask for one grammar")
    return found[0] if found else None


def overridden(options: Options, values: Mapping[str, Any]) -> Options:
    """Options with some of them changed by what JSON says.

    Args:
        options: where `values` say nothing.
        values: option to value; a grammar is ``json_schema``, ``regex`` or ``json_object``.

    Raises:
        UnknownNameError: there is no such option.
        UsageError: a value of another type, or more than one grammar.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in KINDS:
            raise UnknownNameError("key", name, KINDS)
        changed[name] = _read(name, value)
    asked = {name: changed.pop(name) for name in _GRAMMARS if name in changed}
    if asked:
        changed["grammar"] = grammar_of(**asked)
    return replace(options, **changed)


_GRAMMARS = {"json_schema": "a JSON schema", "regex": "a text", "json_object": "true or false"}
_SPECIAL = {
    "logit_bias": "an object of token ids and numbers",
    "stop": "a text or a list of texts",
    "stop_token_ids": "a list of token ids",
    "logprobs": "a whole number or null",
    "prompt_logprobs": "a whole number or null",
}
_PLAIN = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
KINDS = {
    field.name: _SPECIAL.get(field.name) or _PLAIN[str(field.type)]
    for field in fields(Options)
    if field.name != "grammar"
} | _GRAMMARS
"""What a value of each option is, in words."""


def _read(name: str, value: Any) -> Any:
    """A value as `Options` holds it; JSON's true is no number here."""
    kind = KINDS[name]
    whole = isinstance(value, int) and not isinstance(value, bool)
    match kind:
        case "a number" if whole or isinstance(value, float):
            return float(value)
        case "a whole number" if whole:
            return value
        case "a whole number or null" if whole or value is None:
            return value
        case "true or false" if isinstance(value, bool):
            return value
        case "a text" if isinstance(value, str):
            return value
        case "a JSON schema" if isinstance(value, dict | bool | str):
            return value
        case "a text or a list of texts" if isinstance(value, str):
            return (value,)
        case "a text or a list of texts" if isinstance(value, list) and _all(value, str):
            return tuple(value)
        case "a list of token ids" if isinstance(value, list) and _all(value, int):
            return tuple(value)
        case "an object of token ids and numbers" if isinstance(value, dict):
            return read_logit_bias(value)
    raise UsageError(f"{name} = {json.dumps(value)[:80]}: must be {kind}")


def read_logit_bias(pairs: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """Biases from JSON, whose keys are texts.

    Raises:
        UsageError: a key that is no token id, or a bias that is no number.
    """
    try:
        return tuple((int(token), float(bias)) for token, bias in pairs.items())
    except (TypeError, ValueError) as error:
        raise UsageError(f"logit_bias: {error}") from error


def _all(values: list[Any], kind: type) -> bool:
    return all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
