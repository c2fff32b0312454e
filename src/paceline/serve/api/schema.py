"""Bodies of requests. A field that is not here is refused by name: nothing is ignored."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from paceline.core.errors import RequestError
from paceline.decode.sampler import SamplingParams
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.plan.model_spec import ModelSpec
from paceline.serve.request import Request

COMPLETION_MAX_TOKENS = 16  # what the API says of completions without max_tokens

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    """No unknown fields, no conversions: a number is not a text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream holds beside the text."""

    include_usage: bool = False


class TextPart(_Strict):
    """Content in pieces; only text is built in this version."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": self.role, "content": text}


class Sampled(_Strict):
    """What both kinds of completion take."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream = true", param="stream_options")
        return self.stream_options is not None and self.stream_options.include_usage

    def field_of(self, param: str | None) -> str | None:
        """The body's field behind a field of the engine's request."""
        return param

    def request(self, prompt_ids: list[int], max_tokens: int) -> Request:
        """The engine's request."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Request(
            prompt_ids=tuple(prompt_ids),
            sampling=SamplingParams(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                seed=random_seed() if self.seed is None else self.seed,
            ),
            max_tokens=max_tokens,
            stop=tuple(stop),
        )


class ChatBody(Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def to_request(self, tokenizer: Tokenizer, spec: ModelSpec) -> Request:
        """Without a limit an answer may fill the context."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are two names of one limit"
            raise RequestError(message, param="max_tokens", hint="give one of them")
        prompt = render_chat(tokenizer, [message.plain() for message in self.messages])
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        room = max(1, spec.max_positions - len(prompt_ids))
        return self.request(prompt_ids, self.max_completion_tokens or self.max_tokens or room)

    def field_of(self, param: str | None) -> str | None:
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "messages" if param == "prompt" else param


class CompletionBody(Sampled):
    """``POST /v1/completions``."""

    prompt: str

    def to_request(self, tokenizer: Tokenizer, spec: ModelSpec) -> Request:  # noqa: ARG002
        """Without a limit an answer has `COMPLETION_MAX_TOKENS`."""
        limit = self.max_tokens or COMPLETION_MAX_TOKENS
        return self.request(tokenizer.encode(self.prompt), limit)


def random_seed() -> int:
    """A seed for a request that names none."""
    return int.from_bytes(os.urandom(7), "little")
