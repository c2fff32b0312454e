"""Tools that a client offers, and whether the model may, must or must not call one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar
from paceline.models.chat import knows_tools
from paceline.models.tokenizer import Tokenizer
from paceline.serve.api.formats import Name, schema_text
from paceline.serve.api.strict import Strict
from paceline.serve.api.tool_reading import JsonReader, Reader, reader_for


class Function(Strict):
    """A function that the client can run."""

    name: Name
    description: Annotated[str, Field(max_length=16384)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool; functions are all there are."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function that must be called."""

    name: Name


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Tool], Field(min_length=1, max_length=128, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request makes of tools.

    Attributes:
        shown: the tools as the chat template knows them.
        grammar: of a call, where one must be made.
        new_reader: gives what finds calls in an answer; None where there are none.
        is_named: whether the client has named the tool, which it then takes as the answer itself.
        is_single: whether an answer ends with its first call.
    """

    shown: Sequence[dict[str, Any]] = ()
    grammar: Grammar | None = None
    new_reader: Callable[[], Reader] | None = None
    is_named: bool = False
    is_single: bool = False


def tool_use(
    tools: Sequence[Tool] | None,
    choice: ToolChoice | None,
    parallel: bool | None,
    tokenizer: Tokenizer,
) -> ToolUse:
    """What the fields of a body about tools come to.

    Raises:
        RequestError: they contradict each other, or the model knows no tools.
    """
    if tools is None:
        _require_absent(choice, parallel)
        return ToolUse()
    _require_offered(tools, choice)
    if choice == "none":
        return ToolUse()
    require_template_with_tools(tokenizer, "tools")
    names = frozenset(tool.function.name for tool in tools)
    if choice is None or choice == "auto":
        read = reader_for(tokenizer.chat_template or "")
        if read is None:
            message = "tool_choice: calls of this model are not JSON; only forced ones can be read"
            hint = "tool_choice = 'required', or a named tool"
            raise RequestError(message, param="tool_choice", hint=hint)
        return ToolUse(_shown(tools), None, lambda: read(names), is_single=parallel is False)
    called = [tool for tool in tools if choice == "required" or tool.function.name == _name(choice)]
    return ToolUse(
        _shown(tools),
        Grammar("json", schema_text(_call_schema(called), "tools")),
        lambda: JsonReader(names),
        is_named=choice != "required",
        is_single=True,
    )


def require_template_with_tools(tokenizer: Tokenizer, param: str) -> None:
    """Raises RequestError where the model's chat template would leave tools out without a word."""
    if not knows_tools(tokenizer):
        message = f"{param}: the chat template of this model knows no tools"
        raise RequestError(message, param=param, hint="a model that was taught to call tools")


def _require_absent(choice: ToolChoice | None, parallel: bool | None) -> None:
    if choice not in (None, "none"):
        raise RequestError("tool_choice goes with tools", param="tool_choice")
    if parallel is not None:
        raise RequestError("parallel_tool_calls goes with tools", param="parallel_tool_calls")


def _require_offered(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    names = [tool.function.name for tool in tools]
    for index, tool in enumerate(tools):
        param = f"tools.{index}.function"
        if tool.function.name in names[:index]:
            message = f"{param}.name: another tool has the name {tool.function.name!r}"
            raise RequestError(message, param=f"{param}.name")
        if tool.function.strict and choice in (None, "auto"):
            message = f"{param}.strict: arguments are enforced only where a call is"
            hint = "tool_choice = 'required', or a named tool, or leave out strict"
            raise RequestError(message, param=f"{param}.strict", hint=hint)
        schema_text(tool.function.parameters, f"{param}.parameters")
    if isinstance(choice, NamedTool) and _name(choice) not in names:
        message = f"tool_choice: no tool {_name(choice)!r} among tools"
        raise RequestError(message, param="tool_choice")


def _name(choice: ToolChoice) -> str:
    return choice.function.name if isinstance(choice, NamedTool) else ""


def _shown(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates know them: as the client has written them, less what is absent."""
    return [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools]


def _call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """A JSON schema that one call of one of the tools fits."""
    definitions, calls = {}, []
    for index, tool in enumerate(tools):
        home = f"#/$defs/arguments{index}"
        parameters = tool.function.parameters or {"type": "object"}
        definitions[f"arguments{index}"] = _moved(parameters, home)
        properties = {"name": {"const": tool.function.name}, "arguments": {"$ref": home}}
        call = {"type": "object", "properties": properties, "additionalProperties": False}
        calls.append(call | {"required": ["name", "arguments"]})
    whole = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"$defs": definitions} | whole


def _moved(schema: Any, home: str) -> Any:
    """A schema whose references hold inside another, where it stands at `home`."""
    if isinstance(schema, list):
        return [_moved(item, home) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: home + value.removeprefix("#")
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, home)
        for key, value in schema.items()
    }
