"""Text files: each is a document, read in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from paceline.core.errors import DataError
from paceline.data.documents import Advance, Document, Origin, Text

_PIECE_BYTES = 1 << 18
_MAX_PIECE_BYTES = 1 << 22


def read_text(file: Path, advance: Advance) -> Iterator[tuple[Document, Origin]]:
    """The document of a file, in pieces where it is larger than `_PIECE_BYTES`.

    A piece begins where a line does, with a visible character: tokenizers cut there too, so that
    the pieces' tokens are those of the whole.

    Raises:
        DataError: the file is not UTF-8, with the byte.
    """
    origin = Origin(str(file))
    position, is_start = 0, True
    with file.open("rb") as content:
        for piece, is_end in _pieces(content):
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as error:
                place = position + error.start
                raise DataError(f"{file} is not UTF-8 at byte {place}") from error
            yield Text(text.replace("\r\n", "\n").replace("\r", "\n"), is_start, is_end), origin
            position, is_start = position + len(piece), False
            advance(len(piece))


def _pieces(content: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Pieces, and whether each is the last; at least one."""
    pending = b""
    while chunk := content.read(_PIECE_BYTES):
        # Only now is it known that what is pending is not the end.
        if len(pending) >= _PIECE_BYTES and (cut := _cut(pending, chunk)):
            yield pending[:cut], False
            pending = pending[cut:]
        pending += chunk
    yield pending, True


def _cut(pending: bytes, following: bytes) -> int:
    """Where in `pending` the next piece begins; 0 if no line does that begins visibly."""
    text = pending + following[:4]  # as long as the longest character
    end = len(pending)
    while (newline := text.rfind(b"\n", 0, end)) >= 0:
        if not text[newline + 1 : newline + 5].decode(errors="ignore")[:1].isspace():
            return newline + 1
        end = newline
    if len(pending) < _MAX_PIECE_BYTES:
        return 0
    cut = len(pending)  # a line of megabytes: between any two characters
    for _ in range(4):
        if text[cut] & 0xC0 == 0x80 or text[cut] == ord("\n"):
            cut -= 1
    return cut
