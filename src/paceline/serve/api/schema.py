"""Bodies of requests. A field that is not here is refused by name: nothing is ignored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from paceline.core.errors import RequestError
from paceline.decode.grammar import Grammar
from paceline.decode.sampler import SamplingParams
from paceline.models.chat import render_chat
from paceline.models.tokenizer import Tokenizer
from paceline.plan.model_spec import ModelSpec
from paceline.serve.api.asked import Asked
from paceline.serve.api.formats import ResponseFormat, StructuredOutputs, grammar_of
from paceline.serve.api.messages import Messages, plain_messages
from paceline.serve.api.prompts import Prompt, TokenId, each_prompt, prompt_text
from paceline.serve.api.strict import Strict, at_most
from paceline.serve.api.tools import (
    ToolChoice,
    Tools,
    ToolUse,
    require_template_with_tools,
    tool_use,
)
from paceline.serve.request import Request

COMPLETION_MAX_TOKENS = 16  # what the API says of completions without max_tokens
MAX_CHOICES = 128
"""Of one body: its prompts times `n`."""

StopString = Annotated[str, Field(min_length=1, max_length=256)]
StopStrings = Annotated[list[StopString], Field(max_length=16, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataText = Annotated[str, Field(max_length=512)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]


class StreamOptions(Strict):
    """What a stream holds beside the text: usage in a last chunk, or (vLLM's) in every one."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class CommonBody(Strict):
    """What both kinds of completion take.

    `user`, `metadata`, `store` and `service_tier` say nothing about the answer: what OpenAI's
    clients send of them is taken, and kept nowhere.
    """

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[dict[TokenKey, Bias], at_most(300)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=16, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    metadata: Annotated[dict[_MetadataKey, _MetadataText], at_most(16)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    def in_stream(self) -> StreamOptions:
        """What a stream holds beside the text.

        Raises:
            RequestError: there is no stream.
        """
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options goes with stream = true", param="stream_options")
        return self.stream_options or StreamOptions()

    def field_of(self, param: str | None) -> str | None:
        """The body's field behind a field of the engine's request."""
        if param == "grammar":
            return "response_format" if self.response_format else "structured_outputs"
        return "logprobs" if param in ("num_logprobs", "num_prompt_logprobs") else param

    def request(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        *,
        grammar: Grammar | None,
        num_logprobs: int | None,
        num_prompt_logprobs: int | None = None,
    ) -> Request:
        """The engine's request."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Request(
            prompt_ids=tuple(prompt_ids),
            sampling=self._sampling(),
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            stop=tuple(stop),
            stop_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            num_logprobs=num_logprobs,
            num_prompt_logprobs=num_prompt_logprobs,
            grammar=grammar,
        )

    def _sampling(self) -> SamplingParams:
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=tuple(bias.items()),
            seed=random_seed() if self.seed is None else self.seed,
        )


class ChatBody(CommonBody):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def to_asked(self, tokenizer: Tokenizer, spec: ModelSpec) -> Asked:
        """Without a limit an answer may fill the context.

        Raises:
            RequestError: fields that contradict each other, or that the model cannot answer.
        """
        self._require_sound()
        use = tool_use(self.tools, self.tool_choice, self.parallel_tool_calls, tokenizer)
        prompt_ids = chat_prompt_ids(tokenizer, self.messages, use)
        room = max(1, spec.max_positions - len(prompt_ids))
        request = self.request(
            prompt_ids,
            self.max_completion_tokens or self.max_tokens or room,
            grammar=self._grammar(use),
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        return Asked([request], self.n or 1, [""], tools=use)

    def field_of(self, param: str | None) -> str | None:
        if param == "max_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        if param == "grammar" and not (self.response_format or self.structured_outputs):
            return "tools"
        return "messages" if param == "prompt" else super().field_of(param)

    def _require_sound(self) -> None:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            message = "max_tokens and max_completion_tokens are two names of one limit"
            raise RequestError(message, param="max_completion_tokens", hint="give one of them")
        if self.max_tokens == 0:
            raise RequestError("max_tokens = 0 must be positive", param="max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs goes with logprobs = true", param="top_logprobs")

    def _grammar(self, use: ToolUse) -> Grammar | None:
        grammar = grammar_of(self.response_format, self.structured_outputs)
        if grammar is not None and use.new_reader is not None:
            message = "response_format leaves no room for calls of tools"
            hint = "tool_choice = 'none', or no tools"
            raise RequestError(message, param="response_format", hint=hint)
        return grammar or use.grammar


class CompletionBody(CommonBody):
    """``POST /v1/completions``."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def to_asked(self, tokenizer: Tokenizer, spec: ModelSpec) -> Asked:  # noqa: ARG002
        """Without a limit an answer has `COMPLETION_MAX_TOKENS`.

        With `echo` it may have none, for the log-probabilities of a prompt: the engine then
        computes one token, which is not told.

        Raises:
            RequestError: fields that contradict each other, or that the model cannot answer.
        """
        prompts = each_prompt(self.prompt)
        if len(prompts) * (self.n or 1) > MAX_CHOICES:
            message = f"n: {len(prompts)} prompts of {self.n} choices are more than {MAX_CHOICES}"
            raise RequestError(message, param="n")
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens = 0 must be positive, except with echo = true"
            raise RequestError(message, param="max_tokens")
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        grammar = grammar_of(self.response_format, self.structured_outputs)
        requests = [
            self.request(
                tokenizer.encode(prompt) if isinstance(prompt, str) else prompt,
                max(1, limit),
                grammar=grammar,
                num_logprobs=self.logprobs,
                num_prompt_logprobs=self.logprobs if self.echo else None,
            )
            for prompt in prompts
        ]
        echoes = [prompt_text(tokenizer, prompt) if self.echo else "" for prompt in prompts]
        return Asked(requests, self.n or 1, echoes, is_silent=limit == 0)


def chat_prompt_ids(
    tokenizer: Tokenizer,
    messages: Messages,
    use: ToolUse,
    *,
    add_generation_prompt: bool = True,
    add_special_tokens: bool = False,
) -> list[int]:
    """The tokens of a conversation.

    Raises:
        RequestError: the template cannot put it into words.
    """
    conversation = plain_messages(messages)
    if any(message.is_about_tools for message in messages):
        require_template_with_tools(tokenizer, "messages")
    prompt = render_chat(
        tokenizer,
        conversation,
        add_generation_prompt=add_generation_prompt,
        tools=use.shown,
    )
    return tokenizer.encode(prompt, add_special_tokens=add_special_tokens)


def random_seed() -> int:
    """A seed for a request that names none."""
    return int.from_bytes(os.urandom(7), "little")
