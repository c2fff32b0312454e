"""A conversation, as clients send it and as chat templates know it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from paceline.core.errors import RequestError
from paceline.serve.api.strict import Content, Strict, plain_text


class CalledFunction(Strict):
    """What an earlier answer has called."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(min_length=1, max_length=128, fail_fast=True)] | None
    ) = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None

    @property
    def is_about_tools(self) -> bool:
        return self.role == "tool" or self.tool_calls is not None

    def plain(self, where: str) -> dict[str, Any]:
        """The message as chat templates know it, which call a developer the system.

        Raises:
            RequestError: fields that do not go with the role; `where` is the message's name.
        """
        self._require_sound(where)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": plain_text(self.content)}
        if self.tool_calls is not None:
            calls = enumerate(self.tool_calls)
            message["tool_calls"] = [
                _plain_call(call, f"{where}.tool_calls.{n}") for n, call in calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message

    def _require_sound(self, where: str) -> None:
        if self.content is None and self.tool_calls is None:
            raise RequestError(f"{where}.content: a message has one", param=f"{where}.content")
        if self.tool_calls is not None and self.role != "assistant":
            message = f"{where}.tool_calls: only an assistant calls tools"
            raise RequestError(message, param=f"{where}.tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            message = f"{where}.tool_call_id: a tool's message has one, and no other"
            raise RequestError(message, param=f"{where}.tool_call_id")


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as chat templates know it.

    Raises:
        RequestError: names the message, and the field of it, that cannot be.
    """
    return [message.plain(f"messages.{index}") for index, message in enumerate(messages)]


def _plain_call(call: ToolCall, where: str) -> dict[str, Any]:
    """Templates take arguments as an object, clients send them as text."""
    param = f"{where}.function.arguments"
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{param}: not JSON", param=param) from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{param}: not a JSON object", param=param)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
