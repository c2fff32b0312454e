"""What every body that a client sends has in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """No unknown fields, no conversions: a number is not a text.

    A field that is null is a field that is not there, known or not.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            name: field
            for name, field in value.items()
            if field is not None or name in cls.model_fields
        }


class TextPart(Strict):
    """Content in pieces; only text is built in this version."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]


def plain_text(content: Content | None) -> str:
    """The text of a message's content, in pieces or not."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
