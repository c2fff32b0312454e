"""Calls of tools, found in a model's text as it comes.

Models that were taught to call tools write calls as JSON, each family in its own place. A reader
finds them whatever pieces the text comes in, so that a stream holds what a whole answer does. A
call is passed on once it is complete. What is no call of a tool that was offered stays text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol


class Call(NamedTuple):
    """A call that a model has made; `arguments` is the JSON of an object."""

    name: str
    arguments: str


class Found(NamedTuple):
    """What a piece of a model's text has completed, in whatever order it came."""

    text: str = ""
    calls: tuple[Call, ...] = ()


class Reader(Protocol):
    """Parts a model's text into text and calls."""

    def push(self, text: str) -> Found:
        """What the next piece of text completes."""
        ...

    def finish(self) -> Found:
        """What was held back."""
        ...


class TaggedReader:
    """Calls between ``<tool_call>`` and ``</tool_call>``, as Hermes and Qwen write them.

    Space around a call belongs to it.

    Args:
        names: of the tools that were offered.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""  # text whose meaning is not clear yet; a call from its first tag on
        self._searched = 0  # of a call, how much is known to hold no end
        self._is_inside = False
        self._space = ""  # that the next call or text decides about
        self._follows_call = False

    def push(self, text: str) -> Found:
        self._held += text
        texts, calls = [], []
        while (found := self._next()) is not None:
            texts.append(found.text)
            calls.extend(found.calls)
        return Found("".join(texts), tuple(calls))

    def finish(self) -> Found:
        text, self._held = self._shown(self._held), ""
        return Found(text if self._follows_call else text + self._space)

    def _next(self) -> Found | None:
        """What can be told of the text that is held; None if nothing more can."""
        return self._inside() if self._is_inside else self._outside()

    def _outside(self) -> Found | None:
        place = self._held.find(self.OPEN)
        if place < 0:
            place = len(self._held) - _begun(self._held, self.OPEN)
        else:
            self._is_inside, self._searched = True, len(self.OPEN)
        text, self._held = self._held[:place], self._held[place:]
        return Found(self._shown(text)) if text or self._is_inside else None

    def _inside(self) -> Found | None:
        place = self._held.find(self.CLOSE, self._searched)
        if place < 0:
            self._searched = max(self._searched, len(self._held) - len(self.CLOSE) + 1)
            return None
        body = self._held[len(self.OPEN) : place]
        end = place + len(self.CLOSE)
        call = _call(_loaded(body), self._names)
        if call is None and _ends_in_string(body):
            self._searched = end  # the tag is part of an argument
            return Found()
        whole, self._held, self._is_inside = self._held[:end], self._held[end:], False
        if call is None:
            return Found(self._shown(whole))
        self._space, self._follows_call = "", True
        return Found(calls=(call,))

    def _shown(self, text: str) -> str:
        """Text without the space at its end, which waits, and the space after a call."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown and self._follows_call:
            shown, self._follows_call = shown.lstrip(), False
        return shown


class JsonReader:
    """Calls as the whole answer: an object with a name and arguments, or a list of them.

    So write Llama 3 and Mistral, whose marks before a call are special tokens, and so does
    whatever model must call a tool.

    Args:
        names: of the tools that were offered.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> Found:
        if self._is_text:
            return Found(text)
        self._held += text
        begin = self._held.lstrip()[:1]
        if begin in ("", "{", "["):
            return Found()
        self._is_text = True
        return Found(self._held)

    def finish(self) -> Found:
        if self._is_text:
            return Found()
        value = _loaded(self._held)
        calls = [
            _call(item, self._names) for item in (value if isinstance(value, list) else [value])
        ]
        known = tuple(call for call in calls if call is not None)
        return Found(calls=known) if calls and len(known) == len(calls) else Found(self._held)


READERS: dict[str, Callable[[Collection[str]], Reader]] = {
    TaggedReader.OPEN: TaggedReader,
    "": JsonReader,
}
"""What a chat template mentions to how its model's calls are read; the first that fits."""


def reader_for(template: str) -> Callable[[Collection[str]], Reader] | None:
    """How to read the calls of a model with this chat template; None for calls not in JSON."""
    if "<function=" in template:
        return None
    return next(reader for mark, reader in READERS.items() if mark in template)


def _begun(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


def _loaded(text: str) -> Any:
    """The JSON value of a text, or None; models write line breaks into strings."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def _ends_in_string(text: str) -> bool:
    """Whether a text is JSON that stops inside a string."""
    try:
        json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):  # a number of too many digits, lists too deep
        pass
    return False


def _call(value: Any, names: Collection[str]) -> Call | None:
    """A value as a call of one of the tools."""
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _loaded(arguments)
    if not isinstance(arguments, dict):
        return None
    try:  # Python reads more than can be sent: numbers as NaN, halves of characters
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:
        return None
    return Call(name, text)
