"""Bodies of answers as OpenAI's API shapes them: chat and completions, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Protocol


class Shape(Protocol):
    """How one kind of completion is put into words."""

    name: str
    chunk_name: str
    id_prefix: str

    def whole(self, text: str) -> dict[str, Any]:
        """What a choice of a whole answer holds."""
        ...

    def first(self) -> dict[str, Any] | None:
        """What the first chunk's choice holds, if there is one before the text."""
        ...

    def part(self, text: str) -> dict[str, Any]:
        """What a chunk's choice holds."""
        ...


class ChatShape:
    """``chat.completion`` and its chunks."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class CompletionShape:
    """``text_completion``, whose chunks look like the whole."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def first(self) -> dict[str, Any] | None:
        return None

    def part(self, text: str) -> dict[str, Any]:
        return {"text": text}


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all bodies of one answer share."""

    shape: Shape
    model: str
    token: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """A whole answer."""
        choice = self._choice(self.shape.whole(text), finish_reason)
        return {**self._head(self.shape.name), "choices": [choice], "usage": usage}

    def chunk(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        """A part of an answer."""
        return {
            **self._head(self.shape.chunk_name),
            "choices": [self._choice(content, finish_reason)],
        }

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream whose client asked for usage."""
        return {**self._head(self.shape.chunk_name), "choices": [], "usage": usage}

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": f"{self.shape.id_prefix}{self.token}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _choice(self, content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
