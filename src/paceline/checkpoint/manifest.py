"""The manifest: what a checkpoint holds. A checkpoint is complete once it has one."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paceline.core.errors import DataError, UsageError
from paceline.core.files import sha256, write_text

MANIFEST = "manifest.json"
FORMAT = 1
_SUM = "sha256"  # of all else in the manifest, which no other file vouches for
_FOLDER = re.compile(r"step-(\d+)")
_DAMAGED = "the checkpoint is damaged: resume from an older one"


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, as a whole."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken; the data cursor and all randomness follow from it.
        versions: of this package and of torch, at the time of saving.
        plan: the plan in force, as plain data.
        model: the `ModelSpec`, as plain data.
        files: the files, by name.
        tensors: the tensors, by name; ``model.`` and ``optimizer.`` precede parameter names.
        format: version of this file's form.
    """

    step: int
    versions: dict[str, str]
    plan: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Of all files but itself."""
        return sum(entry.size_bytes for entry in self.files.values())

    def commit(self, folder: Path) -> None:
        """Makes the checkpoint complete."""
        data = asdict(self)
        write_text(folder / MANIFEST, json.dumps(data | {_SUM: _checksum(data)}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a complete checkpoint whose files all have their sizes.

    Raises:
        UsageError: not a checkpoint, or one of another format.
        DataError: the manifest is damaged, or a file is missing or cut short.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "a complete checkpoint is a folder step-N with a manifest.json"
        raise UsageError(f"{folder} is not a complete checkpoint", hint=hint) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}", hint=_DAMAGED) from error
    if not isinstance(data, dict) or data.pop(_SUM, None) != _checksum(data):
        raise DataError(f"{path} is damaged, or no manifest: wrong checksum", hint=_DAMAGED)
    if data["format"] != FORMAT:
        raise UsageError(f"{path}: format {data['format']}, this version reads {FORMAT}")
    data["files"] = {name: FileEntry(**entry) for name, entry in data["files"].items()}
    data["tensors"] = {
        name: TensorEntry(tuple(entry["shape"]), entry["dtype"])
        for name, entry in data["tensors"].items()
    }
    manifest = Manifest(**data)
    for name, entry in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.exists() else 0
        if found != entry.size_bytes:
            raise DataError(f"{file} has {found} bytes, not {entry.size_bytes}", hint=_DAMAGED)
    return manifest


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compares every file with its checksum.

    Raises:
        DataError: names the first file that has changed.
    """
    for name, entry in manifest.files.items():
        if sha256(folder / name) != entry.sha256:
            raise DataError(f"{folder / name} is damaged: its checksum has changed", hint=_DAMAGED)


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest step first."""
    found = [
        (int(match[1]), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _FOLDER.fullmatch(path.name)) and (path / MANIFEST).exists()
    ]
    return [path for _, path in sorted(found)]


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run folder.

    Raises:
        UsageError: there is none.
    """
    if (path / MANIFEST).exists():
        return path
    complete = complete_checkpoints(path / "checkpoints")
    if not complete:
        hint = "give a run folder that has saved once, or a checkpoints/step-N of it"
        raise UsageError(f"{path} holds no complete checkpoint", hint=hint)
    return complete[-1]
