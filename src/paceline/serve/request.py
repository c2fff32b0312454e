"""A request: what is asked, and how far it has come.

One rule covers prompts, chunks and answers: a request has `num_computed` tokens whose keys and
values exist, chasing the `tokens` that it consists of. When the last of them is computed, the
next token can be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from paceline.core.errors import RequestError
from paceline.decode.sampler import Draw, Sampled, SamplingParams
from paceline.decode.stop import StopScanner
from paceline.models.tokenizer import IncrementalDecoder, Tokenizer
from paceline.plan.model_spec import ModelSpec
from paceline.serve.kv.pool import Key

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        prompt_ids: the prompt's tokens.
        sampling: how the answer's tokens are chosen.
        max_tokens: the answer's longest length.
        stop: strings that end the answer and are left out of it.
        stop_ids: tokens that end the answer beside the model's own.
        ignore_eos: whether tokens that end an answer are tokens like any other.
        adapter: name of the adapter that answers; empty for none.
        tenant: whose request it is: keys and values are shared within one tenant only.
        timeout_s: after which it is ended, answered or not.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    adapter: str = ""
    tenant: str = ""
    timeout_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of an answer.

    Attributes:
        text: that can be shown.
        token_ids: sampled since the last delta.
        sampled: the same with their log-probabilities, where these are asked for.
        finish_reason: None while the answer goes on. ``abort``: cancelled; ``timeout``: its time
            is up; ``error``: it cannot be answered, or the engine failed.
        error: why, where the reason is an error.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str = ""
    sampled: tuple[Sampled, ...] = ()


@dataclass(slots=True)
class RequestState:
    """How far a request has come; owned by the engine.

    Attributes:
        id: unique in the engine.
        request: what is asked.
        arrival_s: on the engine's clock.
        text: where its tokens become text; not the engine's thread's.
        end_ids: tokens that end the answer.
        root: where the names of its blocks begin.
        tokens: the prompt's and the answer's.
        keys: names of the blocks that these fill, as far as they have been needed.
        num_computed: how many of the tokens the executor has computed.
    """

    id: int
    request: Request
    arrival_s: float
    text: AnswerText
    end_ids: frozenset[int]
    root: Key
    tokens: list[int]
    keys: list[Key] = field(default_factory=list)
    num_computed: int = 0

    @property
    def num_generated(self) -> int:
        """Tokens of the answer."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def max_total(self) -> int:
        """Tokens that it may come to consist of."""
        return len(self.request.prompt_ids) + self.request.max_tokens

    @property
    def deadline_s(self) -> float:
        """When its time is up, on the engine's clock."""
        return self.arrival_s + self.request.timeout_s

    def draw(self) -> Draw:
        """How its next token is chosen."""
        return Draw(self.request.sampling, len(self.tokens))

    def add(self, sampled: Sampled) -> FinishReason | None:
        """Takes up a sampled token; what it ends the answer for, as far as tokens tell."""
        self.tokens.append(sampled.token)
        if sampled.token in self.end_ids:
            return "stop"
        return "length" if self.num_generated >= self.request.max_tokens else None


class AnswerText:
    """What an answer's tokens say, and the stop strings in it.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer and are left out of it.
        on_delta: called with each part of the answer.
        end_ids: tokens that end the answer and say nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_delta: Callable[[Delta], None],
        end_ids: frozenset[int],
    ) -> None:
        self.on_delta = on_delta
        self._decoder, self._scanner = IncrementalDecoder(tokenizer), StopScanner(stop)
        self._end_ids = end_ids

    def push(self, sampled: Sampled, reason: FinishReason | None) -> Delta:
        """The part of the answer that a token completes.

        Args:
            sampled: the token.
            reason: that it ends the answer for, as far as tokens tell.
        """
        text, is_stopped = "", False
        if sampled.token not in self._end_ids:
            text, is_stopped = self._scanner.push(self._decoder.push(sampled.token))
        if reason is not None and not is_stopped:
            # What was held back may still hold a stop string.
            rest, is_stopped = self._scanner.push(self._decoder.finish())
            text += rest if is_stopped else rest + self._scanner.finish()
        told = () if sampled.logprob is None else (sampled,)
        return Delta(text, (sampled.token,), "stop" if is_stopped else reason, sampled=told)


def require_servable(request: Request, spec: ModelSpec, room_tokens: int) -> None:
    """Raises RequestError for what cannot be answered.

    The checks are those that keep one request from harming others: sizes and token ids.

    Args:
        request: that is asked.
        spec: of the model.
        room_tokens: that all blocks of keys and values hold together.
    """
    length = len(request.prompt_ids)
    if length == 0:
        raise RequestError("the prompt is empty", param="prompt")
    if length >= spec.max_positions:
        raise RequestError(
            f"the prompt has {length} tokens, the context {spec.max_positions}",
            param="prompt",
            hint=f"at most {spec.max_positions - 1} tokens of prompt leave room for an answer",
        )
    if request.max_tokens < 1:
        raise RequestError(
            f"max_tokens = {request.max_tokens} must be positive", param="max_tokens"
        )
    if length + request.max_tokens > spec.max_positions:
        raise RequestError(
            f"{length} tokens of prompt and {request.max_tokens} of answer exceed the context "
            f"of {spec.max_positions}",
            param="max_tokens",
            hint=f"max_tokens of at most {spec.max_positions - length}",
        )
    if length + request.max_tokens > room_tokens:
        raise RequestError(
            f"{length} tokens of prompt and {request.max_tokens} of answer exceed the "
            f"{room_tokens} that this server has memory for",
            param="max_tokens",
            hint=f"max_tokens of at most {room_tokens - length}"
            if room_tokens > length
            else "a shorter prompt, or a server with more serve.kv_memory_bytes",
        )
    _require_tokens(request.prompt_ids, spec)
    if any(not stop for stop in request.stop):
        raise RequestError("a stop string is empty", param="stop")


def _require_tokens(ids: Sequence[int], spec: ModelSpec) -> None:
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        raise RequestError(f"token ids must be from 0 to {spec.vocab_size - 1}", param="prompt")
