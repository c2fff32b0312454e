"""JSONL: a record a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from paceline.core.errors import DataError
from paceline.data.documents import EXPECTED, Advance, Document, Origin, parse_record

_MAX_SHOWN = 200


def read_jsonl(file: Path, advance: Advance) -> Iterator[tuple[Document, Origin]]:
    """The documents of a file, each line's, of which blank ones hold none.

    Raises:
        DataError: a broken line, by number.
    """
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                origin = Origin(str(file), "line", number)
                yield parse_record(_parse(line, str(origin)), str(origin)), origin
            advance(len(line))


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8", hint=f"write {EXPECTED}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error)[:_MAX_SHOWN]
        raise DataError(f"{where}: not JSON: {reason}", hint=f"write {EXPECTED}") from error
