"""The forms that a prompt may have: text or tokens, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from paceline.models.tokenizer import Tokenizer

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _kind_of_prompt(prompt: Any) -> str:
    """Which of its forms a prompt is meant to have."""
    first = prompt[0] if isinstance(prompt, list) and prompt else prompt
    many = "s" if isinstance(prompt, list) else ""
    if isinstance(first, list):
        return "[lists]"
    return "[tokens]" if isinstance(first, int) and many else f"[text{many}]"


_Texts = Annotated[list[str], Field(min_length=1, max_length=64, fail_fast=True)]
_Lists = Annotated[list[TokenIds], Field(min_length=1, max_length=64, fail_fast=True)]
Prompt = Annotated[
    Annotated[str, Tag("[text]")]
    | Annotated[_Texts, Tag("[texts]")]
    | Annotated[TokenIds, Tag("[tokens]")]
    | Annotated[_Lists, Tag("[lists]")],
    Discriminator(_kind_of_prompt),
]
"""A text, a list of texts, the tokens of one prompt, or lists of tokens."""


def each_prompt(prompt: Prompt) -> Sequence[str | list[int]]:
    """The prompts of a body, one by one."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    return texts or lists or [[item for item in prompt if isinstance(item, int)]]


def prompt_text(tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """A prompt as text."""
    return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
