"""What every body that a client sends has in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MAX_FIELDS = 256


class Strict(BaseModel):
    """No unknown fields, no conversions: a number is not a text.

    A field that is null is a field that is not there, known or not. A body of many mistakes is
    refused for the first few of them, before a list of them all is made: lists in it fail fast
    (`fail_fast`), and mappings have a length (`at_most`).
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > _MAX_FIELDS:
            raise ValueError(f"more than {_MAX_FIELDS} fields")
        return {
            name: field
            for name, field in value.items()
            if field is not None or name in cls.model_fields
        }


class TextPart(Strict):
    """Content in pieces; only text is built in this version."""

    type: Literal["text"]
    text: str


def at_most(count: int) -> BeforeValidator:
    """Refuses a mapping of more entries before it looks at one."""

    def require(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > count:
            raise ValueError(f"more than {count} entries")
        return value

    return BeforeValidator(require)


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]


def plain_text(content: Content | None) -> str:
    """The text of a message's content, in pieces or not."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
