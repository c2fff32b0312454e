"""Bodies of answers as OpenAI's API shapes them: chat and completions, whole or in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from paceline.serve.api.choices import Choice, Piece
from paceline.serve.api.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    LogprobShape,
    NoLogprobs,
)
from paceline.serve.api.token_texts import TokenTexts
from paceline.serve.api.tool_reading import Call


class Shape(Protocol):
    """How one kind of completion is put into words."""

    name: str
    chunk_name: str
    id_prefix: str

    def logprobs(self, texts: TokenTexts) -> LogprobShape:
        """How a choice's log-probabilities are told."""
        ...

    def whole(self, piece: Piece) -> dict[str, Any]:
        """What a choice of a whole answer holds."""
        ...

    def first(self) -> dict[str, Any] | None:
        """What a choice's first chunk holds, if there is one before the text."""
        ...

    def part(self, piece: Piece, num_calls: int) -> dict[str, Any]:
        """What a chunk's choice holds, after so many calls in earlier ones."""
        ...


class ChatShape:
    """``chat.completion`` and its chunks."""

    name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def logprobs(self, texts: TokenTexts) -> LogprobShape:
        return ChatLogprobs(texts)

    def whole(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text}
        if piece.calls:
            message["content"] = piece.text or None
            message["tool_calls"] = [_call(call) for call in piece.calls]
        return {"message": message}

    def first(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}}

    def part(self, piece: Piece, num_calls: int) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
        if piece.calls:
            calls = enumerate(piece.calls, num_calls)
            delta["tool_calls"] = [{"index": index, **_call(call)} for index, call in calls]
        return {"delta": delta}


class CompletionShape:
    """``text_completion``, whose chunks look like the whole."""

    name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def logprobs(self, texts: TokenTexts) -> LogprobShape:
        return CompletionLogprobs(texts)

    def whole(self, piece: Piece) -> dict[str, Any]:
        return {"text": piece.text}

    def first(self) -> dict[str, Any] | None:
        return None

    def part(self, piece: Piece, num_calls: int) -> dict[str, Any]:  # noqa: ARG002
        return {"text": piece.text}


class Envelope:
    """What all bodies of one answer share.

    Args:
        shape: of the answer.
        model: as its client calls it.
        texts: of tokens, where log-probabilities are asked for.
    """

    def __init__(self, shape: Shape, model: str, texts: TokenTexts | None = None) -> None:
        self._shape, self._texts = shape, texts
        self._tail = {"created": int(time.time()), "model": model}
        self._id = f"{shape.id_prefix}{secrets.token_hex(12)}"
        self._writers: dict[int, _Writer] = {}

    def body(
        self, choices: Sequence[tuple[Choice, Piece]], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """A whole answer."""
        whole = [
            self._choice(
                choice.index,
                self._shape.whole(piece),
                self._logprobs().put(piece.told),
                piece.finish_reason,
            )
            for choice, piece in choices
        ]
        return {**self._head(self._shape.name), "choices": whole, "usage": usage}

    def event(self, choice: Choice, piece: Piece, usage: dict[str, Any] | None = None) -> str:
        """A piece of a choice as server-sent events, with usage so far if wanted.

        A call and the end of its choice are two events: OpenAI's client takes a call for whole
        when the next event comes.
        """
        if piece.calls and piece.finish_reason:
            calls = self.event(choice, piece._replace(finish_reason=None), usage)
            return calls + self.event(choice, Piece(finish_reason=piece.finish_reason), usage)
        writer, first = self._writers.get(choice.index), ""
        if writer is None:
            writer = self._writers[choice.index] = self._writer(choice.index)
            if (content := self._shape.first()) is not None:
                first = event(self._chunk(choice.index, content, None, None, usage))
        is_plain = not (piece.calls or piece.finish_reason or usage or writer.tells)
        if is_plain and piece.text:
            return first + writer.text_event(piece.text)
        content = self._shape.part(piece, writer.num_calls)
        writer.num_calls += len(piece.calls)
        told = writer.logprobs.put(piece.told) if piece.told else None
        return first + event(self._chunk(choice.index, content, told, piece.finish_reason, usage))

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last part of a stream whose client asked for usage."""
        return {**self._head(self._shape.chunk_name), "choices": [], "usage": usage}

    def _writer(self, index: int) -> _Writer:
        def chunk_of(text: str) -> str:
            content = self._shape.part(Piece(text), 0)
            return event(self._chunk(index, content, None, None, None))

        return _Writer(chunk_of, self._logprobs(), tells=self._texts is not None)

    def _logprobs(self) -> LogprobShape:
        return self._shape.logprobs(self._texts) if self._texts is not None else NoLogprobs()

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
        usage: dict[str, Any] | None,
    ) -> dict[str, Any]:
        choice = self._choice(index, content, logprobs, finish_reason)
        chunk = {**self._head(self._shape.chunk_name), "choices": [choice]}
        return chunk if usage is None else {**chunk, "usage": usage}

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, **self._tail}

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}


class _Writer:
    """Writes the chunks of one choice.

    A chunk of nothing but text is most of a stream: all around the text is written once.

    Args:
        chunk_of: gives the event of a text.
        logprobs: how log-probabilities are told.
        tells: whether they are.
    """

    def __init__(
        self, chunk_of: Callable[[str], str], logprobs: LogprobShape, *, tells: bool
    ) -> None:
        place = secrets.token_hex(8)  # that nothing else in a chunk can be
        self._before, self._after = chunk_of(place).split(json.dumps(place))
        self.logprobs, self.tells = logprobs, tells
        self.num_calls = 0

    def text_event(self, text: str) -> str:
        """The event of a piece that is text alone."""
        return f"{self._before}{json.dumps(text)}{self._after}"


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int | None = None
) -> dict[str, Any]:
    """Tokens read and written, and of the first how many were found computed, where it is known."""
    counts: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    if cached_tokens is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return counts


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
