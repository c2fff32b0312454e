"""What an answer's text must be: formats that clients ask for, as grammars."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar
from paceline.serve.api.strict import Strict

MAX_SCHEMA_BYTES = 1 << 16
MAX_SCHEMA_DEPTH = 32
MAX_REGEX_CHARACTERS = 4096

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(Strict):
    """A JSON schema with a name; it is enforced, strict or not."""

    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """What the text must be.

        Raises:
            RequestError: the schema is missing, too much, or where none belongs.
        """
        param = "response_format.json_schema"
        if (self.json_schema is not None) != (self.type == "json_schema"):
            message = f"{param} goes with response_format.type = 'json_schema'"
            raise RequestError(message, param=param)
        if self.json_schema is not None:
            return Grammar("json", schema_text(self.json_schema.schema_, f"{param}.schema"))
        return Grammar("json-object") if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """What an answer must be, as vLLM's clients ask for it: a regular expression or a schema."""

    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)] | None = None
    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None

    def grammar(self) -> Grammar:
        """What the text must be.

        Raises:
            RequestError: not exactly one of the two, or a schema that is none or too much.
        """
        param = "structured_outputs"
        if (self.regex is None) == (self.json_ is None):
            raise RequestError(f"{param} takes one of regex and json", param=param)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        schema = self.json_
        if isinstance(schema, str):
            schema = _parsed(schema, f"{param}.json")
        return Grammar("json", schema_text(schema, f"{param}.json"))


def grammar_of(
    response_format: ResponseFormat | None, structured: StructuredOutputs | None
) -> Grammar | None:
    """What an answer must be, if anything is asked.

    Raises:
        RequestError: both are asked, or what is asked cannot be.
    """
    if response_format is not None and structured is not None:
        message = "response_format and structured_outputs are two ways to ask for one thing"
        raise RequestError(message, param="structured_outputs", hint="give one of them")
    if structured is not None:
        return structured.grammar()
    return response_format.grammar() if response_format is not None else None


def schema_text(schema: Any, param: str) -> str:
    """A schema as JSON, once it is known to be of bounded size.

    Raises:
        RequestError: it is nested too deep, or too long.
    """
    if _depth_exceeds(schema, MAX_SCHEMA_DEPTH):
        message = f"{param}: nested more than {MAX_SCHEMA_DEPTH} deep"
        raise RequestError(message, param=param)
    text = json.dumps(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise RequestError(f"{param}: more than {MAX_SCHEMA_BYTES} bytes", param=param)
    return text


def _parsed(text: str, param: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param}: not JSON", param=param) from error
    if not isinstance(schema, dict):
        raise RequestError(f"{param}: not a JSON object", param=param)
    return schema


def _depth_exceeds(value: Any, most: int) -> bool:
    """Whether lists and objects are nested deeper; layer by layer, as recursion has an end."""
    layer = [value]
    for _ in range(most + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True
