"""A file of prompts: JSON objects, one a line.

A line has a ``prompt`` or ``messages``, perhaps an ``id``, and any option of `Options`. Its seed
follows from the job's and the line's number, so an answer does not depend on other lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paceline.core import rng
from paceline.core.errors import DataError, UsageError, name_hint
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.serve.options import KINDS, Options, overridden

_ASKS = ("prompt", "messages", "id")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input.

    Attributes:
        number: of the line, from 1.
        asked: ``prompt`` or ``messages``, and ``id`` where it has one.
        options: how it is answered.
    """

    number: int
    asked: Mapping[str, Any]
    options: Options

    def prompt_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its prompt's tokens.

        Raises:
            RequestError: messages that the model's template refuses, or a text that is none.
        """
        if "messages" in self.asked:
            prompt = render_chat(tokenizer, self.asked["messages"])
            return tokenizer.encode(prompt, add_special_tokens=False)
        prompt = self.asked["prompt"]
        return tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)


def read_lines(path: Path, options: Options) -> Iterator[Line]:
    """The lines of a file; empty ones are refused, as their answers would be missing.

    Args:
        path: of JSON objects, one a line.
        options: where a line says nothing.

    Raises:
        UsageError: the file cannot be read.
        DataError: a line that cannot be used, with its number.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    with file:
        for number, text in enumerate(file, 1):
            try:
                yield _line(number, json.loads(text.decode()), options)
            except UsageError as error:
                raise DataError(f"{path}:{number}: {error.message}", hint=error.hint) from error
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from error


def _line(number: int, values: Any, options: Options) -> Line:
    if not isinstance(values, dict):
        raise UsageError("a line is a JSON object", hint='{"prompt": "..."}')
    asked = {key: values[key] for key in _ASKS if key in values}
    if ("prompt" in asked) == ("messages" in asked):
        raise UsageError('a line has either "prompt" or "messages"')
    if "prompt" in asked and not _is_prompt(asked["prompt"]):
        raise UsageError("prompt: must be a text or a list of token ids")
    if "messages" in asked and not _are_messages(asked["messages"]):
        raise UsageError('messages: must be a list of {"role": "...", "content": "..."}')
    rest = {key: value for key, value in values.items() if key not in asked}
    if unknown := [key for key in rest if key not in KINDS]:
        raise UsageError(
            f"unknown key {unknown[0]!r}", hint=name_hint(unknown[0], [*_ASKS, *KINDS])
        )
    own = replace(options, seed=line_seed(options.seed, number))
    return Line(number, asked, overridden(own, rest))


def line_seed(seed: int, number: int) -> int:
    """The seed of a line that names none."""
    return int(rng.bits(1, seed=seed, purpose="line", stream=number)[0] >> 8)


def _is_prompt(value: Any) -> bool:
    if isinstance(value, str):
        return True
    is_list = isinstance(value, list)
    return is_list and all(isinstance(x, int) and not isinstance(x, bool) for x in value)


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and set(message) == {"role", "content"}
            and all(isinstance(text, str) for text in message.values())
            for message in value
        )
    )
