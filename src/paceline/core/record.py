"""Records: typed events of a run, one JSON object a line.

A record type is a frozen dataclass deriving from `Record`; its `kind` is the class's name in the
file. Writers append and flush whole lines, so that a killed run leaves at most one broken line,
at the end, which readers drop.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TextIO

from paceline.core.errors import DataError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Base of all records."""

    kind: ClassVar[str] = "record"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


class RecordWriter:
    """Appends records to a file.

    Args:
        path: the JSONL file; its folder is made if need be. A broken last line, left by a
            killed writer, is cut off first.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_broken_line(path)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record.to_dict()) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path, kind: str | None = None) -> Iterator[dict[str, Any]]:
    """Yields the records of a file, of one kind if it is given.

    Raises:
        UsageError: there is no such file.
        DataError: a line other than the last is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is broken
        try:
            record = json.loads(line.decode("utf-8"))
            record_kind = record["kind"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, line {number}: not a record") from error
        if kind is None or record_kind == kind:
            yield record


def _cut_broken_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
