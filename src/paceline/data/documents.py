"""What a document is, and how a record's keys say which kind: text, a chat, or a prompt with its
completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from paceline.core.errors import DataError

EXPECTED = (
    '{"text": "..."}, {"messages": [{"role": "...", "content": "..."}]} or '
    '{"prompt": "...", "completion": "..."}'
)
"""The shapes of a record, as a person writes them."""

Advance = Callable[[int], None]
"""Told the bytes that have been read, for a progress bar."""

NOT_BUILT = ("tools", "tool_calls")
"""Keys that a chat template writes into the text, so that they cannot be passed over."""

_SHAPES = (("text",), ("messages",), ("prompt", "completion"))


class Origin(NamedTuple):
    """Where a document stands.

    Attributes:
        file: its path.
        unit: what `number` counts, "line" or "row"; empty where the file is the document.
        number: from 1.
    """

    file: str
    unit: str = ""
    number: int = 0

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}" if self.unit else self.file


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, or a piece of one.

    Attributes:
        text: of at most a few hundred thousand characters where it comes from a text file.
        is_start: whether a document begins with it.
        is_end: whether a document ends with it.
    """

    text: str
    is_start: bool = True
    is_end: bool = True


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation.

    Attributes:
        messages: each with at least a ``role`` and a ``content``.
        first_answer: index of the message from which on the assistant's are answers.
    """

    messages: tuple[dict[str, Any], ...]
    first_answer: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the answer to it."""

    prompt: str
    completion: str


Document = Text | Chat | Completion


def shape_of(keys: list[str], where: str) -> tuple[str, ...]:
    """The keys of `keys` that make a document.

    Raises:
        DataError: they make none, or more than one.
    """
    shapes = [shape for shape in _SHAPES if set(shape) <= set(keys)]
    if not shapes:
        found = ", ".join(keys) if keys else "no keys"
        raise DataError(f"{where}: found {found}; expected {EXPECTED}")
    if len(shapes) > 1:
        named = " and ".join(" with ".join(shape) for shape in shapes)
        raise DataError(f"{where}: holds {named}", hint="leave the keys of one kind")
    return shapes[0]


def parse_record(record: object, where: str) -> Document:
    """The document of a record, whose kind its keys say; other keys are not looked at.

    Args:
        record: plain data, as JSON or Parquet gives it.
        where: file and line or row, for errors.

    Raises:
        DataError: no document's keys, or values of a wrong type.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {_kind(record)}, not an object", hint=f"write {EXPECTED}")
    fields = cast("Mapping[str, object]", record)
    shape = shape_of(list(fields), where)
    if shape == ("text",):
        return Text(_text(fields, "text", where))
    _refuse_tools(fields, where)
    if shape == ("messages",):
        return Chat(_messages(fields["messages"], f"{where}: messages"))
    if isinstance(fields["prompt"], str):
        prompt, completion = _text(fields, "prompt", where), _text(fields, "completion", where)
        return Completion(prompt, completion)
    return _chat_completion(fields, where)


def _chat_completion(fields: Mapping[str, object], where: str) -> Chat:
    """A prompt of messages, completed by messages or by the text of one."""
    prompt = _messages(fields["prompt"], f"{where}: prompt")
    if isinstance(fields["completion"], str):
        answer = {"role": "assistant", "content": _text(fields, "completion", where)}
        return Chat((*prompt, answer), first_answer=len(prompt))
    completion = _messages(fields["completion"], f"{where}: completion")
    return Chat((*prompt, *completion), first_answer=len(prompt))


def _messages(value: object, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list):
        rule = f"must be a list of messages, not {_kind(value)}"
        raise DataError(f"{where} {rule}", hint=f"write {EXPECTED}")
    if not value:
        raise DataError(f"{where} is empty", hint="leave the record out")
    return tuple(_message(item, f"{where}[{i}]") for i, item in enumerate(cast("list[Any]", value)))


def _message(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {_kind(value)}, not an object", hint=f"write {EXPECTED}")
    # Parquet fills the keys that other rows have with None.
    fields = {k: v for k, v in cast("Mapping[str, Any]", value).items() if v is not None}
    _refuse_tools(fields, where)
    for key in ("role", "content"):
        _text(fields, key, where)
    return fields


def _refuse_tools(fields: Mapping[str, object], where: str) -> None:
    for key in NOT_BUILT:
        if fields.get(key):
            raise DataError(f"{where}: {key} are not built in this version", hint="leave them out")


def _text(fields: Mapping[str, object], key: str, where: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        found = _kind(value) if key in fields else "absent"
        raise DataError(f"{where}: {key} must be a text, not {found}", hint=f"write {EXPECTED}")
    try:
        value.encode("utf-8")  # JSON can spell halves of characters, which are no text
    except UnicodeError as error:
        raise DataError(f"{where}: {key} is not UTF-8") from error
    return value


def _kind(value: object) -> str:
    names = {
        "NoneType": "null",
        "bool": "true or false",
        "int": "a number",
        "float": "a number",
        "str": "a text",
        "list": "a list",
        "tuple": "a list",
        "dict": "an object",
        "bytes": "bytes",
    }
    return names.get(type(value).__name__, type(value).__name__)
