"""Files that appear under their final name whole, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from paceline.core.errors import UsageError

_CHUNK_BYTES = 1 << 22


@contextmanager
def new_file(path: Path) -> Generator[Path]:
    """Gives a temporary path beside `path`; on success syncs it and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Gives a temporary folder beside `path`; on success syncs it and renames it to `path`.

    If another process has made `path` in the meantime, its folder stays and ours is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for inner in temporary.rglob("*"):
            inner.chmod((0o777 if inner.is_dir() else 0o666) & ~_umask())
            sync_file(inner)
        temporary.chmod(0o777 & ~_umask())
        sync_file(temporary)
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
        sync_file(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Generator[None]:
    """Holds a lock on `path`, which need not exist, among the processes of this machine.

    The lock is a file beside it that goes when the lock does, and with the process that holds it
    the lock ends too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    while True:
        with file.open("wb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is_file(handle, file):
                continue  # whoever held the lock has removed the file: lock a new one
            try:
                yield
            finally:
                file.unlink()
            return


@contextmanager
def held(path: Path, what: str) -> Generator[None]:
    """Holds `path`, a file that is made, for this process alone; the kernel frees it at its end.

    Args:
        path: the file; it says which process holds it.
        what: is held, for the error.

    Raises:
        UsageError: another process holds it; it is named.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise UsageError(
                f"{what} is being written by another process, {holder}",
                hint=f"wait for it to end, or end it: kill {holder}",
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _is_file(handle: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Hexadecimal SHA-256 of a file; `advance` is told the bytes read, for a progress bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
