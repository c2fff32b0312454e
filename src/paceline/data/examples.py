"""Chats and completions as text, with the characters that are answers; only they have a loss."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from paceline.core.errors import DataError, PacelineError
from paceline.data.documents import Chat, Completion, Origin

_WHOLE = "train.answers_only = false trains on whole conversations"


class ChatRenderer(Protocol):
    """A model's chat template.

    Args:
        messages: the conversation.
        add_generation_prompt: whether the text ends where the assistant is to answer next.

    Raises:
        PacelineError: the model has no template, or it refuses the messages.
    """

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> str: ...


class Example(NamedTuple):
    """What a chat or a completion is to a tokenizer.

    Attributes:
        text: all of it, special tokens spelt out.
        answers: characters (start, end) of each answer, in order; None means that all counts.
            An end that follows the text counts as one character more.
        is_ended: whether the text spells its own end, as chat templates do.
    """

    text: str
    answers: list[tuple[int, int]] | None
    is_ended: bool


def as_example(
    document: Chat | Completion, render: ChatRenderer, *, answers_only: bool, origin: Origin
) -> Example:
    """The example of a document.

    Args:
        document: what was read.
        render: the model's chat template.
        answers_only: whether only answers count.
        origin: for errors.

    Raises:
        DataError: no answer, or a template in which answers cannot be found.
    """
    if isinstance(document, Completion):
        text = document.prompt + document.completion
        answers = [(len(document.prompt), len(text) + 1)]
        return Example(text, answers if answers_only else None, is_ended=False)
    try:
        if answers_only:
            return _with_answers(document, render, origin)
        text = render(document.messages, add_generation_prompt=False)
        return Example(text, None, is_ended=True)
    except DataError:
        raise
    except PacelineError as error:
        raise DataError(f"{origin}: {error.message}", hint=error.hint) from error


def _with_answers(chat: Chat, render: ChatRenderer, origin: Origin) -> Example:
    """Renders the conversation as it grows: what each answer adds to its prompt is the answer."""
    answers: list[tuple[int, int]] = []
    seen = ""
    for i, message in enumerate(chat.messages):
        if message["role"] == "assistant" and i >= chat.first_answer:
            prompt = render(chat.messages[:i], add_generation_prompt=True)
            answered = render(chat.messages[: i + 1], add_generation_prompt=False)
            _require_prefix(seen, prompt, i, origin)
            _require_prefix(prompt, answered, i, origin)
            answers.append((len(prompt), len(answered)))
            seen = answered
    if not answers:
        raise DataError(f"{origin}: no message of the assistant to learn from", hint=_WHOLE)
    text = render(chat.messages, add_generation_prompt=False)
    _require_prefix(seen, text, len(chat.messages) - 1, origin)
    return Example(text, answers, is_ended=True)


def _require_prefix(shorter: str, longer: str, index: int, origin: Origin) -> None:
    if not longer.startswith(shorter):
        raise DataError(
            f"{origin}: with messages[{index}] the chat template writes what came before it anew, "
            "so that the answers in it cannot be told",
            hint=f"another chat template; or {_WHOLE}",
        )


def answer_tokens(
    example: Example, ids: list[int], starts: list[int], end_ids: Sequence[int]
) -> list[tuple[int, int]]:
    """Tokens (start, end) of each answer: its content and the token that ends its turn.

    A token belongs to the answer in whose characters it starts. White space that a template
    writes after the end of a turn does not.

    Args:
        example: what was tokenised.
        ids: its tokens.
        starts: the character at which each starts.
        end_ids: tokens that end an answer.
    """
    if example.answers is None:
        return [(0, len(ids))]
    spans: list[tuple[int, int]] = []
    for first, last in example.answers:
        start, end = bisect_left(starts, first), bisect_left(starts, last)
        turn_end = next((i + 1 for i in range(end - 1, start - 1, -1) if ids[i] in end_ids), end)
        if turn_end < end and example.text[starts[turn_end] : last].isspace():
            end = turn_end
        if start < end:
            spans.append((start, end))
    return spans
