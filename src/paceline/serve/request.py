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

from paceline.decode.grammar import Grammar
from paceline.decode.sampler import Draw, Sampled, SamplingParams
from paceline.decode.stop import StopScanner
from paceline.models.tokenizer import IncrementalDecoder, Tokenizer
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
        min_tokens: the answer's shortest length: before, neither a token nor a stop string ends it.
        num_logprobs: how many of the likeliest tokens are told of with each token's
            log-probability; 0 for none but its own, None for no log-probabilities.
        num_prompt_logprobs: the same for the prompt's tokens but the first.
        grammar: what the answer's text must be; None for anything.
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
    min_tokens: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    grammar: Grammar | None = None
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
        prompt: the prompt's tokens but the first with theirs, in the answer's first part, where
            these are asked for.
        finish_reason: None while the answer goes on. ``abort``: cancelled; ``timeout``: its time
            is up; ``error``: it cannot be answered, or the engine failed.
        error: why, where the reason is an error.
        num_found: how many of the prompt's tokens were found in the cache.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str = ""
    sampled: tuple[Sampled, ...] = ()
    prompt: tuple[Sampled, ...] = ()
    num_found: int = 0


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
        is_busy: whether a step that is not done yet has a part of it.
        num_found: how many of the prompt's were found in the cache; None before it has run.
        scores: the prompt's tokens but the first with their log-probabilities, as far as they are
            known, where they are asked for.
        admitted_s: when it first held blocks; None before.
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
    is_busy: bool = False
    num_found: int | None = None
    scores: list[Sampled] = field(default_factory=list)
    admitted_s: float | None = None

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
        request = self.request
        needs_end, grammar = request.min_tokens > 0, request.grammar
        needs_history = needs_end or grammar is not None or request.sampling.uses_history
        return Draw(
            request.sampling,
            len(self.tokens),
            history=self.tokens if needs_history else (),
            num_prompt=len(request.prompt_ids),
            num_logprobs=request.num_logprobs,
            min_tokens=request.min_tokens,
            end_ids=tuple(sorted(self.end_ids)) if needs_end else (),
            grammar=grammar,
        )

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its prompt are still to be computed."""
        wanted = self.request.num_prompt_logprobs is not None
        return wanted and len(self.scores) < len(self.request.prompt_ids) - 1

    def scored(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens of the prompt that `tokens[start:end]` tell the log-probabilities of."""
        return self.request.prompt_ids[start + 1 : end + 1] if self.wants_scores else ()

    def begin_anew(self) -> None:
        """Its keys and values are gone."""
        self.num_computed = 0
        if self.wants_scores:  # a part of them does not say where they end
            self.scores.clear()

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
        min_tokens: of the answer, before which no stop string is looked for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        on_delta: Callable[[Delta], None],
        end_ids: frozenset[int],
        min_tokens: int = 0,
    ) -> None:
        self.on_delta = on_delta
        self._decoder, self._scanner = IncrementalDecoder(tokenizer), StopScanner(stop)
        self._end_ids, self._num_unscanned = end_ids, min_tokens

    def push(
        self,
        sampled: Sampled,
        reason: FinishReason | None,
        *,
        prompt: tuple[Sampled, ...] = (),
        num_found: int = 0,
    ) -> Delta:
        """The part of the answer that a token completes.

        Args:
            sampled: the token.
            reason: that it ends the answer for, as far as tokens tell.
            prompt: what is told of the prompt's tokens with it.
            num_found: how many of these were found in the cache.
        """
        text, is_stopped = "", False
        if sampled.token not in self._end_ids:
            text, is_stopped = self._scan(self._decoder.push(sampled.token))
        if reason is not None and not is_stopped:
            # What was held back may still hold a stop string.
            rest, is_stopped = self._scanner.push(self._decoder.finish())
            text += rest if is_stopped else rest + self._scanner.finish()
        told = () if sampled.logprob is None else (sampled,)
        reason = "stop" if is_stopped else reason
        return Delta(text, (sampled.token,), reason, "", told, prompt, num_found)

    def _scan(self, text: str) -> tuple[str, bool]:
        """As the scanner's `push`, of what one token says."""
        if self._num_unscanned > 0:
            self._num_unscanned -= 1
            return text, False
        return self._scanner.push(text)
