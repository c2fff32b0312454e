"""Tokenised text on disk, memory-mapped: made once for a source and a tokenizer, then shared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from paceline.core.errors import DataError
from paceline.core.files import new_folder
from paceline.data.sources import read_documents, source_files, source_identity

_FORMAT = 1
_BATCH_CHARACTERS = 1 << 21


class TextEncoder(Protocol):
    """What this package needs of a tokenizer."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True, slots=True)
class TokenStore:
    """The tokens of a source, document after document.

    Attributes:
        tokens: all tokens, each document ended by the end-of-text token.
        ends: index after the last token of each document.
    """

    tokens: NDArray[np.uint32]
    ends: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Maps the files of a folder."""
        return cls(np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "ends.npy"))


def tokenize(
    source: str, encoder: TextEncoder, *, identity: str, end_token: int, cache: Path
) -> TokenStore:
    """The tokens of a source, from the cache if they are there.

    Args:
        source: a SRC argument.
        encoder: the tokenizer.
        identity: what tells this tokenizer from others, for example its file's content.
        end_token: put after every document.
        cache: folder for token stores.
    """
    key = json.dumps([_FORMAT, source_identity(source), identity, end_token])
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:24]
    if not folder.exists():
        _write(source, encoder, end_token, folder)
    return TokenStore.open(folder)


def _write(source: str, encoder: TextEncoder, end_token: int, folder: Path) -> None:
    chunks: list[NDArray[np.uint32]] = []
    lengths: list[int] = []
    for texts in _batches(source):
        for ids in encoder.encode_batch(texts):
            chunks.append(np.array([*ids, end_token], dtype=np.uint32))
            lengths.append(len(ids) + 1)
    if not any(length > 1 for length in lengths):
        raise DataError(f"{source} holds no text")
    with new_folder(folder) as temporary:
        np.save(temporary / "tokens.npy", np.concatenate(chunks))
        np.save(temporary / "ends.npy", np.cumsum(lengths, dtype=np.int64))


def _batches(source: str) -> Iterator[list[str]]:
    texts: list[str] = []
    characters = 0
    console = Console(stderr=True)
    for file in track(
        source_files(source), f"tokenising {source}", console=console, transient=True
    ):
        for text in read_documents(file):
            texts.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts
