"""Where text comes from: a SRC argument to documents."""

from __future__ import annotations

import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from paceline.core.errors import DataError, UnknownNameError, UsageError

_BUILTIN = "builtin:"
_STDLIB = "builtin:python-stdlib"
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
_NOT_BUILT = (".parquet",)


def source_files(source: str) -> list[Path]:
    """The files of a source, in a fixed order.

    Args:
        source: a text or JSONL file, a folder of such, or ``builtin:python-stdlib``.

    Raises:
        UsageError: no such source, a kind that this version does not read, or no files in it.
    """
    if source.startswith(_BUILTIN):
        if source != _STDLIB:
            raise UnknownNameError("built-in text", source, [_STDLIB])
        return _standard_library()
    path = Path(source)
    if path.suffix in _NOT_BUILT:
        hint = "text and JSONL files can be read"
        raise UsageError(f"{path}: reading {path.suffix} is not built in this version", hint=hint)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path}: no such file or folder", hint=f"a path, or {_STDLIB}")
    found = (file for file in path.rglob("*") if file.suffix in _TEXT_SUFFIXES)
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UsageError(
            f"{path} holds no text", hint=f"files ending in {' '.join(_TEXT_SUFFIXES)}"
        )
    return files


def source_identity(source: str) -> list[list[str | int]]:
    """What tells one state of a source from another, without reading its files."""
    if source == _STDLIB:
        return [[_STDLIB, platform.python_implementation(), platform.python_version()]]
    stats = [(file, file.stat()) for file in source_files(source)]
    return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def read_documents(file: Path) -> Iterator[str]:
    """The documents of one file: each line's ``text`` in JSONL, the whole file otherwise.

    Raises:
        DataError: a broken line, by number, or a file that is not UTF-8.
    """
    try:
        if file.suffix == ".jsonl":
            yield from _read_jsonl(file)
        else:
            yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}") from error


def _read_jsonl(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read_line(line, f"{file}, line {number}")


def _read_line(line: bytes, where: str) -> str:
    hint = 'write {"text": "..."} on each line'
    try:
        text = json.loads(line.decode("utf-8"))["text"]
        if not isinstance(text, str):
            raise TypeError
        text.encode("utf-8")  # JSON can spell halves of characters, which are no text
    except UnicodeError as error:
        raise DataError(f"{where}: not UTF-8", hint=hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: no text in it", hint=hint) from error
    return text


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
