"""Where text comes from: a SRC argument to files, and files to documents."""

from __future__ import annotations

import math
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from paceline.core.errors import DataError, UnknownNameError, UsageError
from paceline.data.documents import Advance, Document, Origin
from paceline.data.jsonl import read_jsonl
from paceline.data.parquet import read_parquet
from paceline.data.text import read_text

_READERS = {".jsonl": read_jsonl, ".parquet": read_parquet}  # all other files are text

_BUILTIN = "builtin:"
_STDLIB = "builtin:python-stdlib"
_SUFFIXES = (".txt", ".md", ".rst", ".py", *_READERS)
_WEIGHT_HINT = "write SRC=WEIGHT with a positive number, for example a.jsonl=0.7"


class WeightedSource(NamedTuple):
    """A source, and its share of the rows of a mixture before the shares are made to sum to 1."""

    source: str
    weight: float = 1.0


def parse_source(text: str) -> WeightedSource:
    """Reads ``SRC`` or ``SRC=WEIGHT``; the weight follows the last ``=``.

    What is there under the whole text is a source, so that paths may hold ``=``.

    Raises:
        UsageError: the weight is not a positive number.
    """
    source, separator, weight = text.rpartition("=")
    if not separator or Path(text).exists():
        return WeightedSource(text)
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not source or not 0 < value < math.inf:
        message = f"--data {text}: there is no such path, and {weight!r} is not a weight"
        raise UsageError(message, hint=_WEIGHT_HINT)
    return WeightedSource(source, value)


def source_files(source: str) -> list[Path]:
    """The files of a source, in a fixed order.

    Args:
        source: a file, a folder, or ``builtin:python-stdlib``. A file is read as JSONL or Parquet
            if its suffix says so, and as text otherwise; of a folder the files are taken whose
            suffix is known, in it and below it.

    Raises:
        UsageError: no such source, or no files in it.
    """
    if source.startswith(_BUILTIN):
        if source != _STDLIB:
            raise UnknownNameError("built-in text", source, [_STDLIB])
        return _standard_library()
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder", hint=f"a path, or {_STDLIB}")
    found = (file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UsageError(f"{path} holds no text", hint=f"files ending in {' '.join(_SUFFIXES)}")
    return files


def source_identity(source: str) -> list[list[str | int]]:
    """What tells one state of a source from another, without reading its files."""
    if source == _STDLIB:
        return [[_STDLIB, platform.python_implementation(), platform.python_version()]]
    stats = [(file, file.stat()) for file in source_files(source)]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def read_documents(
    file: Path, advance: Advance = lambda _: None
) -> Iterator[tuple[Document, Origin]]:
    """The documents of one file with their places: each line's or row's, or the whole text.

    Raises:
        DataError: content that is broken, by line, row or byte, or a file that cannot be read.
        MissingExtraError: a package is needed to read it.
    """
    try:
        yield from _READERS.get(file.suffix, read_text)(file, advance)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _standard_library() -> list[Path]:
    """Its source without its tests, some of which are broken on purpose."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "__pycache__",
    }
    return sorted(
        file for file in root.rglob("*.py") if skipped.isdisjoint(file.relative_to(root).parts)
    )
