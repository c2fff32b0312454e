"""Chat templates: messages to a prompt, in a sandbox.

A template is code from a model's files. It runs in Jinja's immutable sandbox, sees messages and
special tokens and nothing else, and never comes from a client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from paceline.core.errors import RequestError
from paceline.models.tokenizer import Tokenizer

_MAX_TEMPLATE_CHARACTERS = 100_000


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A conversation as the model reads it.

    Args:
        tokenizer: it has the template.
        messages: the conversation.
        add_generation_prompt: whether the text ends where the assistant is to answer next, or
            with the last message.
        tools: that the model may call; a template that does not know tools leaves them out.

    Raises:
        RequestError: the model has no template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        hint = "use completions, which take a plain prompt"
        raise RequestError("this model has no chat template", param="messages", hint=hint)
    try:
        template = _compile(tokenizer.chat_template)
        return template.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **({"tools": [dict(tool) for tool in tools]} if tools else {}),
            **tokenizer.special_tokens,
        )
    except Exception as error:  # a template is a model's code: it may raise anything
        raise RequestError(
            f"the chat template refuses these messages: {error}", param="messages"
        ) from error


def knows_tools(tokenizer: Tokenizer) -> bool:
    """Whether a model's chat template shows it the tools that it may call."""
    return "tools" in _variables(tokenizer.chat_template or "")


class _GenerationMarks(Extension):
    """``{% generation %}``, with which some templates mark answers for training; it writes nothing.

    Paceline finds answers in templates without it too (`paceline.data.examples`).
    """

    tags = {"generation"}  # noqa: RUF012 (as its base declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    if len(source) > _MAX_TEMPLATE_CHARACTERS:
        raise jinja2.TemplateError(f"longer than {_MAX_TEMPLATE_CHARACTERS} characters")
    return _environment().from_string(source)


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    """What a template reads of what it is given; nothing if it cannot be read."""
    if len(source) > _MAX_TEMPLATE_CHARACTERS:
        return frozenset()
    try:
        return frozenset(meta.find_undeclared_variables(_environment().parse(source)))
    except jinja2.TemplateError:
        return frozenset()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationMarks, "jinja2.ext.loopcontrols"],
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
