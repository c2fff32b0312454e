"""One choice of an answer: from the engine's deltas to what its client is told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from paceline.decode.sampler import Sampled
from paceline.serve.api.errors import EngineFailedError
from paceline.serve.api.tool_reading import Call, Found
from paceline.serve.api.tools import ToolUse
from paceline.serve.request import Delta, FinishReason, Request


class Piece(NamedTuple):
    """What is new of a choice.

    Attributes:
        text: of the answer.
        calls: of tools.
        told: tokens with their log-probabilities, where these are asked for.
        finish_reason: as OpenAI's API names it; None while the choice goes on.
    """

    text: str = ""
    calls: tuple[Call, ...] = ()
    told: tuple[Sampled, ...] = ()
    finish_reason: str | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.text or self.calls or self.told or self.finish_reason)


def join(pieces: Iterable[Piece]) -> Piece:
    """Several pieces as one."""
    pieces = list(pieces)
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(call for piece in pieces for call in piece.calls),
        tuple(one for piece in pieces for one in piece.told),
        pieces[-1].finish_reason if pieces else None,
    )


class Choice:
    """One choice, on the event loop.

    Args:
        index: among the choices of its answer.
        request: that the engine answers.
        echo: text that the choice begins with.
        is_silent: whether nothing but the prompt is told.
        use: what the answer makes of tools.
    """

    def __init__(
        self, index: int, request: Request, echo: str, *, is_silent: bool, use: ToolUse
    ) -> None:
        self.index, self.request = index, request
        self.is_done = self.has_ended = False  # for the client; in the engine
        self.num_tokens = self.num_found = self.num_calls = 0
        self._echo, self._is_silent, self._use = echo, is_silent, use
        self._reader = use.new_reader() if use.new_reader else None
        self._is_begun = False
        self._deltas: list[Delta] = []

    def receive(self, delta: Delta) -> None:
        """A part of the engine's answer, for the next `take`."""
        self._deltas.append(delta)

    def take(self) -> Piece:
        """All that has come since the last time.

        Raises:
            EngineFailedError: the answer will not be finished, and all before has been taken.
        """
        deltas, self._deltas = self._deltas, []
        pieces: list[Piece] = []
        for place, delta in enumerate(deltas):
            if self.is_done:
                break
            if delta.finish_reason in ("abort", "error", "timeout"):
                if not pieces:
                    raise EngineFailedError(delta.finish_reason, delta.error)
                self._deltas = deltas[place:]
                break
            pieces.append(self._piece(delta))
        return pieces[0] if len(pieces) == 1 else join(pieces)

    @property
    def is_waiting(self) -> bool:
        """Whether there is something to take."""
        return bool(self._deltas) and not self.is_done

    def _piece(self, delta: Delta) -> Piece:
        found = self._read(delta)
        told = self._told(delta)
        text = found.text if self._is_begun else self._echo + found.text
        self._is_begun = True
        self.num_calls += len(found.calls)
        self.num_tokens += 0 if self._is_silent else len(delta.token_ids)
        is_last_call = bool(found.calls) and self._use.is_single
        self.has_ended = delta.finish_reason is not None
        self.is_done = self.has_ended or is_last_call
        self.num_found = delta.num_found
        reason = self._reason(delta.finish_reason) if self.is_done else None
        return Piece(text, found.calls, told, reason)

    def _read(self, delta: Delta) -> Found:
        """What a delta says, once tools are read out of it."""
        if self._is_silent:
            return Found()
        if self._reader is None:
            return Found(delta.text)
        found = self._reader.push(delta.text)
        if delta.finish_reason is not None:
            rest = self._reader.finish()
            found = Found(found.text + rest.text, found.calls + rest.calls)
        if self._use.is_single and found.calls:
            return Found(found.text, found.calls[:1])
        return found

    def _told(self, delta: Delta) -> tuple[Sampled, ...]:
        """Tokens of the prompt, the first of which nothing foretold, then those of the answer."""
        prompt: Sequence[Sampled] = ()
        if self.request.num_prompt_logprobs is not None:
            first = () if self._is_begun else (Sampled(self.request.prompt_ids[0]),)
            prompt = (*first, *delta.prompt)
        return (*prompt, *(() if self._is_silent else delta.sampled))

    def _reason(self, reason: FinishReason | None) -> str:
        if self._is_silent:
            return "length"
        if self.num_calls and not self._use.is_named and reason != "length":
            return "tool_calls"
        return reason or "stop"
