"""A request: what is asked, and how far it has come.

One rule covers prompts, chunks and answers: a request has `num_computed` tokens whose keys and
values exist, chasing the `tokens` that it consists of. When the last of them is computed, the
next token can be sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from paceline.core.errors import RequestError
from paceline.decode.sampler import SamplingParams
from paceline.decode.stop import StopScanner
from paceline.models.tokenizer import IncrementalDecoder, Tokenizer
from paceline.plan.model_spec import ModelSpec

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked.

    Attributes:
        prompt_ids: the prompt's tokens.
        sampling: how the answer's tokens are chosen.
        max_tokens: the answer's longest length.
        stop: strings that end the answer and are left out of it.
        ignore_eos: whether tokens that end an answer are tokens like any other.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """A part of an answer.

    Attributes:
        text: that can be shown.
        token_ids: sampled since the last delta.
        finish_reason: None while the answer goes on. ``abort``: cancelled; ``error``: the engine
            failed.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(slots=True)
class RequestState:
    """How far a request has come; owned by the engine.

    Attributes:
        id: unique in the engine.
        request: what is asked.
        arrival_s: on the engine's clock.
        on_delta: called with each part of the answer.
        tokens: the prompt's and the answer's.
        num_computed: how many of them the executor has computed.
    """

    id: int
    request: Request
    arrival_s: float
    on_delta: Callable[[Delta], None]
    decoder: IncrementalDecoder
    scanner: StopScanner
    eos_ids: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0

    @classmethod
    def start(
        cls,
        number: int,
        request: Request,
        arrival_s: float,
        on_delta: Callable[[Delta], None],
        tokenizer: Tokenizer,
    ) -> RequestState:
        return cls(
            id=number,
            request=request,
            arrival_s=arrival_s,
            on_delta=on_delta,
            decoder=IncrementalDecoder(tokenizer),
            scanner=StopScanner(request.stop),
            eos_ids=() if request.ignore_eos else tokenizer.eos_ids,
            tokens=list(request.prompt_ids),
        )

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    def add_token(self, token: int) -> Delta:
        """Takes up a sampled token: the part of the answer that it completes."""
        self.tokens.append(token)
        if token in self.eos_ids:
            return Delta(self._rest(), (token,), "stop")
        text, is_stopped = self.scanner.push(self.decoder.push(token))
        if is_stopped:
            return Delta(text, (token,), "stop")
        if self.num_generated >= self.request.max_tokens:
            return self._last_delta(text, token)
        return Delta(text, (token,), None)

    def _last_delta(self, text: str, token: int) -> Delta:
        """The answer is full; what was held back may still hold a stop string."""
        rest, is_stopped = self.scanner.push(self.decoder.finish())
        if is_stopped:
            return Delta(text + rest, (token,), "stop")
        return Delta(text + rest + self.scanner.finish(), (token,), "length")

    def _rest(self) -> str:
        text, is_stopped = self.scanner.push(self.decoder.finish())
        return text if is_stopped else text + self.scanner.finish()


def require_servable(request: Request, spec: ModelSpec) -> None:
    """Raises RequestError for what the model cannot answer.

    The checks are those that keep one request from harming others: sizes and token ids.
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
    _require_tokens(request.prompt_ids, spec)
    if any(not stop for stop in request.stop):
        raise RequestError("a stop string is empty", param="stop")


def _require_tokens(ids: Sequence[int], spec: ModelSpec) -> None:
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        raise RequestError(f"token ids must be from 0 to {spec.vocab_size - 1}", param="prompt")
