"""What an answer's text must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer's text must be.

    Attributes:
        kind: ``json``: JSON of a schema; ``regex``: what a regular expression matches as a whole;
            ``json-object``: any JSON object.
        text: the schema as JSON or the regular expression; empty for any JSON object.
    """

    kind: Literal["json", "regex", "json-object"]
    text: str = ""
