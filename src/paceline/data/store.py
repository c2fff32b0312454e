"""Tokens on disk, memory-mapped: shards of bounded size, and where each document ends."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.data.documents import Origin

SHARD_TOKENS = 1 << 26
_TOKEN, _INDEX = np.dtype("<u4"), np.dtype("<i8")


class Tokens(Protocol):
    """Many tokens, of which slices are read."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: slice, /) -> NDArray[np.uint32]: ...


class Shards:
    """Arrays of one size, but for the last, as if they were one."""

    def __init__(self, arrays: Sequence[NDArray[np.uint32]]) -> None:
        self._arrays = arrays
        self._size = len(arrays[0])

    def __len__(self) -> int:
        return self._size * (len(self._arrays) - 1) + len(self._arrays[-1])

    def __getitem__(self, places: slice, /) -> NDArray[np.uint32]:
        start, stop, _ = places.indices(len(self))
        parts: list[NDArray[np.uint32]] = []
        while start < stop:
            shard, first = divmod(start, self._size)
            part = self._arrays[shard][first : first + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else self._arrays[0][:0]


class KeptTokens:
    """Some spans of tokens, laid end to end."""

    def __init__(self, tokens: Tokens, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        self._tokens = tokens
        self._starts = starts
        self._ends = np.cumsum(ends - starts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, places: slice, /) -> NDArray[np.uint32]:
        start, stop, _ = places.indices(len(self))
        parts: list[NDArray[np.uint32]] = []
        while start < stop:
            span = int(np.searchsorted(self._ends, start, side="right"))
            left = int(self._ends[span]) - start  # of this span
            first = int(self._starts[span]) + self._size(span) - left
            parts.append(self._tokens[first : first + min(left, stop - start)])
            start += len(parts[-1])
        return np.concatenate(parts) if parts else self._tokens[0:0]

    def _size(self, span: int) -> int:
        return int(self._ends[span]) - (int(self._ends[span - 1]) if span else 0)


@dataclass(frozen=True, slots=True)
class TokenStore:
    """The tokens of a source's documents, one after the other.

    Attributes:
        tokens: all tokens; slices of it are read.
        ends: index after the last token of each document.
        answers: tokens (start, end) of each answer, in order, where only they have a loss; None
            for text, all of which has one.
        origins: for each document the index of its file in `files`, and its line or row.
        files: for errors.
    """

    tokens: Tokens
    ends: NDArray[np.int64]
    answers: NDArray[np.int64] | None = None
    origins: NDArray[np.int64] | None = None
    files: tuple[tuple[str, str], ...] = ()

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first token of each document."""
        return np.concatenate([np.zeros(1, np.int64), self.ends[:-1]])

    def labels(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Tokens `start` to `end`, and which of them have a loss as labels."""
        tokens = self.tokens[start:end].astype(np.int64)
        if self.answers is None:
            return tokens, np.ones(len(tokens), dtype=np.bool_)
        places = np.arange(start, start + len(tokens))
        answer = np.searchsorted(self.answers[:, 0], places, side="right") - 1
        return tokens, (answer >= 0) & (places < self.answers[answer, 1])

    def keep(self, is_kept: NDArray[np.bool_]) -> TokenStore:
        """A text store of some of the documents."""
        assert self.answers is None, "answers would have to move with their documents"
        starts, ends = self.starts[is_kept], self.ends[is_kept]
        origins = None if self.origins is None else self.origins[is_kept]
        kept = KeptTokens(self.tokens, starts, ends)
        return TokenStore(kept, np.cumsum(ends - starts), None, origins, self.files)

    def origin(self, document: int) -> str:
        """Where a document stands, in words."""
        if self.origins is None:
            return f"document {document}"
        file, number = self.origins[document].tolist()
        path, unit = self.files[file]
        return str(Origin(path, unit, number))


class StoreWriter:
    """Writes the files of a store, document after document, holding none of them.

    Args:
        folder: a new folder.
        with_answers: whether documents have answers.
    """

    def __init__(self, folder: Path, *, with_answers: bool) -> None:
        folder.mkdir()
        self._folder = folder
        self._stack = ExitStack()
        self._ends = self._open("ends")
        self._origins = self._open("origins")
        self._answers = self._open("answers") if with_answers else None
        self._shard = self._open("tokens-00000")
        self._digest = hashlib.sha256()
        self.num_tokens = 0

    def add(self, ids: Sequence[int], answers: Sequence[tuple[int, int]] = ()) -> None:
        """Adds tokens to the document at hand, with the answers among them."""
        tokens = np.asarray(ids, dtype=_TOKEN)
        self._digest.update(tokens.tobytes())
        if self._answers is not None:
            spans = np.asarray(answers, dtype=_INDEX).reshape(-1, 2) + self.num_tokens
            self._answers.write(spans.tobytes())
            self._digest.update(spans.tobytes())
        while len(tokens):
            room = SHARD_TOKENS - self.num_tokens % SHARD_TOKENS
            if room == SHARD_TOKENS:
                self._next_shard()
            self._shard.write(tokens[:room].tobytes())
            self.num_tokens += len(tokens[:room])
            tokens = tokens[room:]

    def end(self, file: int, number: int) -> None:
        """Ends the document at hand, which stands at a line or row of a file."""
        end = np.asarray([self.num_tokens], dtype=_INDEX).tobytes()
        self._ends.write(end)
        self._digest.update(end)
        self._origins.write(np.asarray([file, number], dtype=_INDEX).tobytes())

    def close(self) -> str:
        """Closes the files; returns a hash of what they hold, which knows no path."""
        self._stack.close()
        return self._digest.hexdigest()

    def _next_shard(self) -> None:
        if self.num_tokens:
            self._shard.close()
            self._shard = self._open(f"tokens-{self.num_tokens // SHARD_TOKENS:05d}")

    def _open(self, name: str) -> BinaryIO:
        return self._stack.enter_context((self._folder / name).open("wb"))


def open_store(folder: Path, files: tuple[tuple[str, str], ...]) -> TokenStore:
    """Maps what a `StoreWriter` has written.

    Args:
        folder: where.
        files: of each file that `end` was told of, its path and what its numbers count.
    """
    shards = [_map(path, _TOKEN) for path in sorted(folder.glob("tokens-*"))]
    answers = folder / "answers"
    return TokenStore(
        shards[0] if len(shards) == 1 else Shards(shards),
        _map(folder / "ends", _INDEX),
        _map(answers, _INDEX).reshape(-1, 2) if answers.exists() else None,
        _map(folder / "origins", _INDEX).reshape(-1, 2),
        files,
    )


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.memmap(path, dtype=dtype, mode="r")
