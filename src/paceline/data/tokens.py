"""Sources tokenised: made once for a source and a tokenizer, then shared by all who map it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from paceline.core.errors import DataError
from paceline.core.files import locked, new_folder
from paceline.data.documents import Chat, Completion, Document, Origin, Text
from paceline.data.examples import ChatRenderer, answer_tokens, as_example
from paceline.data.sources import read_documents, source_files, source_identity
from paceline.data.store import StoreWriter, TokenStore, open_store

_FORMAT = 2
_BATCH_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 1 << 14
_KINDS = ("text", "examples")
_INDEX_FILE = "source.json"

Located = tuple[Document, Origin]


class TextEncoder(Protocol):
    """What this package needs of a tokenizer.

    Attributes:
        eos_ids: tokens that end an answer.
        start_ids: tokens that a text begins with.
    """

    @property
    def eos_ids(self) -> Sequence[int]: ...

    @property
    def start_ids(self) -> Sequence[int]: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts, without any that start or end them."""
        ...

    def encode_with_starts(self, texts: list[str]) -> list[tuple[list[int], list[int]]]:
        """The same, with the index of the character at which each token starts."""
        ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """How documents become tokens.

    Attributes:
        encoder: the tokenizer.
        render: the model's chat template.
        identity: what tells these two from others, for example the content of their files.
        end_token: put after every document but chats, whose template ends them.
        answers_only: whether of chats and completions only the answers have a loss.
    """

    encoder: TextEncoder
    render: ChatRenderer
    identity: str
    end_token: int
    answers_only: bool = True


@dataclass(frozen=True, slots=True)
class Source:
    """A source, tokenised.

    Attributes:
        name: the SRC argument.
        stores: its texts, and its examples (chats and completions), where it has any.
        identity: a hash of the tokens, whatever files they came from.
        weight: its share of a mixture's rows.
    """

    name: str
    stores: tuple[TokenStore, ...]
    identity: str = ""
    weight: float = 1.0


def tokenize(source: str, encoding: Encoding, *, cache: Path, weight: float = 1.0) -> Source:
    """The tokens of a source, from the cache if they are there.

    Of several processes that want them at a time, one makes them and the others wait.

    Args:
        source: a SRC argument.
        encoding: how.
        cache: folder for token stores.
        weight: of the source in a mixture.

    Raises:
        DataError: content that is broken, or no text at all; nothing is left in the cache.
    """
    key = [_FORMAT, source_identity(source), encoding.identity, encoding.end_token]
    text = json.dumps([*key, encoding.answers_only])
    folder = cache / hashlib.sha256(text.encode()).hexdigest()[:24]
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                _write(source, encoding, folder)
    index = json.loads((folder / _INDEX_FILE).read_text(encoding="utf-8"))
    files = tuple((path, unit) for path, unit in index["files"])
    stores = (open_store(folder / kind, files) for kind in index["kinds"])
    return Source(source, tuple(stores), index["identity"], weight)


def _write(source: str, encoding: Encoding, folder: Path) -> None:
    files = source_files(source)
    with new_folder(folder) as temporary, closing(_SourceWriter(temporary, encoding)) as writer:
        with _progress() as progress:
            total_bytes = sum(file.stat().st_size for file in files)
            task = progress.add_task(f"tokenising {source}", total=total_bytes)
            for batch, size_bytes in _batches(files):
                writer.add(batch)
                progress.advance(task, size_bytes)
        if not writer.has_text:
            raise DataError(f"{source} holds no text")
        (temporary / _INDEX_FILE).write_text(json.dumps(writer.close()), encoding="utf-8")


def _progress() -> Progress:
    """A bar by bytes, on a terminal alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    is_hidden = not console.is_terminal
    remaining = TimeRemainingColumn()
    return Progress(*columns, remaining, console=console, transient=True, disable=is_hidden)


class _SourceWriter:
    """Encodes documents and puts each into the store of its kind."""

    def __init__(self, folder: Path, encoding: Encoding) -> None:
        self._folder = folder
        self._encoding = encoding
        self._start = tuple(encoding.encoder.start_ids)
        self._stores: dict[str, StoreWriter] = {}
        self._files: dict[tuple[str, str], int] = {}
        self.has_text = False

    def add(self, batch: list[Located]) -> None:
        """Adds documents; those of a kind stay in order."""
        texts = [(d, origin) for d, origin in batch if isinstance(d, Text)]
        others = [(d, origin) for d, origin in batch if not isinstance(d, Text)]
        if texts:
            self._add_texts(texts)
        if others:
            self._add_examples(others)

    def close(self) -> dict[str, object]:
        """Closes the stores; returns what is known of them."""
        kinds = [kind for kind in _KINDS if kind in self._stores]
        hashes = [[kind, self._stores[kind].close()] for kind in kinds]
        return {
            "identity": hashlib.sha256(json.dumps(hashes).encode()).hexdigest(),
            "kinds": kinds,
            "files": list(self._files),
        }

    def _add_texts(self, texts: list[tuple[Text, Origin]]) -> None:
        encoder, store = self._encoding.encoder, self._store("text")
        all_ids = encoder.encode_batch([document.text for document, _ in texts])
        for (document, origin), ids in zip(texts, all_ids, strict=True):
            self.has_text |= bool(ids)
            start = self._start if document.is_start else ()
            end = (self._encoding.end_token,) if document.is_end else ()
            store.add([*start, *ids, *end])
            if document.is_end:
                store.end(self._file(origin), origin.number)

    def _add_examples(self, located: list[tuple[Chat | Completion, Origin]]) -> None:
        encoder, store = self._encoding.encoder, self._store("examples")
        render, answers_only = self._encoding.render, self._encoding.answers_only
        examples = [
            as_example(document, render, answers_only=answers_only, origin=origin)
            for document, origin in located
        ]
        encoded = encoder.encode_with_starts([example.text for example in examples])
        for (_, origin), example, (ids, starts) in zip(located, examples, encoded, strict=True):
            self.has_text |= bool(ids)
            if not example.is_ended:
                ids = [*self._start, *ids, self._encoding.end_token]
                starts = [*[-1] * len(self._start), *starts, len(example.text)]
            store.add(ids, answer_tokens(example, ids, starts, encoder.eos_ids))
            store.end(self._file(origin), origin.number)

    def _store(self, kind: str) -> StoreWriter:
        if kind not in self._stores:
            with_answers = kind == "examples"
            self._stores[kind] = StoreWriter(self._folder / kind, with_answers=with_answers)
        return self._stores[kind]

    def _file(self, origin: Origin) -> int:
        return self._files.setdefault((origin.file, origin.unit), len(self._files))


def _batches(files: Sequence[Path]) -> Iterator[tuple[list[Located], int]]:
    """The documents of files, some megabytes at a time, and the bytes that they were read from."""
    batch: list[Located] = []
    characters = size_bytes = 0

    def advance(count: int) -> None:
        nonlocal size_bytes
        size_bytes += count

    for file in files:
        for document, origin in read_documents(file, advance):
            batch.append((document, origin))
            characters += _size(document)
            if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, size_bytes
                batch, characters, size_bytes = [], 0, 0
    if batch:
        yield batch, size_bytes


def _size(document: Document) -> int:
    """Characters, about."""
    match document:
        case Text():
            return len(document.text)
        case Chat():
            return sum(len(message["content"]) for message in document.messages)
        case Completion():
            return len(document.prompt) + len(document.completion)
