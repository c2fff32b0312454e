"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from paceline.decode.sampler import Sampled
from paceline.serve.api.token_texts import TokenTexts


class LogprobShape(Protocol):
    """How the tokens of one choice are told of, in the pieces that they come in."""

    def put(self, told: Sequence[Sampled]) -> dict[str, Any] | None:
        """The next tokens; None if they are not to be told of."""
        ...


class NoLogprobs:
    """Of a choice whose log-probabilities nobody asked for."""

    def put(self, told: Sequence[Sampled]) -> dict[str, Any] | None:  # noqa: ARG002
        return None


class ChatLogprobs:
    """A list of tokens, each with the likeliest ones in its place.

    Args:
        texts: of tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def put(self, told: Sequence[Sampled]) -> dict[str, Any] | None:
        return {"content": [self._entry(one) for one in told]}

    def _entry(self, one: Sampled) -> dict[str, Any]:
        top = [self._token(token, logprob) for token, logprob in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        raw = list(self._texts.bytes_of(token))
        return {"token": self._texts.text_of(token), "logprob": _finite(logprob), "bytes": raw}


class CompletionLogprobs:
    """Four lists side by side, with the place of each token in the choice's text.

    Args:
        texts: of tokens.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._offset = 0
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, told: Sequence[Sampled]) -> dict[str, Any] | None:
        return {
            "tokens": [self._texts.text_of(one.token) for one in told],
            "token_logprobs": [_finite(one.logprob) for one in told],
            "top_logprobs": [self._top(one) for one in told],
            "text_offset": [self._advance(one.token) for one in told],
        }

    def _top(self, one: Sampled) -> dict[str, float] | None:
        """The likeliest tokens, and the one in question; None of the first, which has none."""
        if one.logprob is None:
            return None
        pairs = [*one.top, (one.token, one.logprob)]
        return {self._texts.text_of(token): _least(logprob) for token, logprob in pairs}

    def _advance(self, token: int) -> int:
        """Where a token starts; in the middle of a character, where that one starts."""
        start = self._offset
        if self._texts.is_shown(token):
            self._offset += len(self._characters.decode(self._texts.bytes_of(token)))
        return start


_LEAST = -9999.0  # what OpenAI's API says of a token that cannot be; JSON has no infinity


def _least(logprob: float) -> float:
    return max(logprob, _LEAST)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else _least(logprob)
