"""The manifest: what a checkpoint holds. A checkpoint is complete once it has one.

Format 2 adds to format 1, which is read as before, what each tensor is made of and how far the run
has come. Shapes are those of the model, whatever the layout: no part is padded when it is stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from paceline.core.errors import DataError, UsageError
from paceline.core.files import sha256, write_text
from paceline.plan.declared import Declared, Piece
from paceline.plan.layout import Box

MANIFEST = "manifest.json"
FORMAT = 2
_READ = (1, FORMAT)
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
    """One tensor of a checkpoint, as a whole.

    Attributes:
        shape: the model's own, without padding.
        dtype: as torch names it.
        axes: what each dimension stands for, where the model says so.
        pieces: the tensors that are stacked or fused in it, where the model says so.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...] = ()
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TensorEntry:
        """What the manifest's JSON has of it."""
        pieces = (
            Piece(piece["name"], Box(tuple(piece["box"]["offsets"]), tuple(piece["box"]["sizes"])))
            for piece in data.get("pieces", ())
        )
        axes = tuple(data.get("axes", ()))
        return cls(tuple(data["shape"]), data["dtype"], axes, tuple(pieces))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come beside its tensors: plain data, whose content is the trainer's.

    Attributes:
        cursor: what of the data has been read, and in which order.
        streams: what all randomness follows from.
        optimizer: its name and the settings of its groups, as they were at the last step.
        scaler: state of a gradient scaler. None: training in bfloat16 and in float32 needs none,
            and a checkpoint that has one is not loaded.
    """

    cursor: dict[str, Any]
    streams: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps taken.
        versions: of this package and of torch, at the time of saving.
        plan: the plan in force, as plain data.
        model: the `ModelSpec`, as plain data.
        files: the files, by name.
        tensors: the tensors, by name; ``model.`` and ``optimizer.`` precede parameter names.
        progress: of the run; None in format 1, and where there is no run.
        format: version of this file's form.
    """

    step: int
    versions: dict[str, str]
    plan: dict[str, Any]
    model: dict[str, Any]
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    progress: Progress | None = None
    format: int = FORMAT

    @property
    def size_bytes(self) -> int:
        """Of all files but itself."""
        return sum(entry.size_bytes for entry in self.files.values())

    def stating(self, progress: Progress | None, declared: Mapping[str, Declared]) -> Manifest:
        """The same with what a run says of itself.

        Args:
            progress: of the run.
            declared: what tensors are made of, by name. Nothing is said of those that are absent,
                nor of those of other dimensions than their axes, as of a counter of steps.
        """
        tensors = dict(self.tensors)
        for name, entry in tensors.items():
            known = declared.get(name)
            if known is not None and len(known.axes) in (0, len(entry.shape)):
                tensors[name] = replace(entry, axes=known.axes, pieces=known.pieces)
        return replace(self, tensors=tensors, progress=progress)

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
    if data["format"] not in _READ:
        known = " and ".join(map(str, _READ))
        raise UsageError(f"{path}: format {data['format']}, this version reads {known}")
    manifest = _from_json(data)
    for name, entry in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.exists() else 0
        if found != entry.size_bytes:
            raise DataError(f"{file} has {found} bytes, not {entry.size_bytes}", hint=_DAMAGED)
    return manifest


def _from_json(data: dict[str, Any]) -> Manifest:
    files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
    tensors = {name: TensorEntry.from_dict(entry) for name, entry in data["tensors"].items()}
    found = data.get("progress")
    progress = None if found is None else Progress(**found)
    return Manifest(**data | {"files": files, "tensors": tensors, "progress": progress})


def verify_files(folder: Path, manifest: Manifest, index: int = 0, num_parts: int = 1) -> None:
    """Compares files with their checksums.

    Args:
        folder: the checkpoint.
        manifest: of it.
        index: which part of the files, where several processes share them out.
        num_parts: how many share them.

    Raises:
        DataError: names the first file that has changed.
    """
    for name, entry in sorted(manifest.files.items())[index::num_parts]:
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


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a complete checkpoint's, whatever it is called."""
    return (path / MANIFEST).exists()


def file_entries(paths: Iterable[Path]) -> dict[str, FileEntry]:
    """What a manifest says of files, by their names; reads each of them."""
    return {path.name: FileEntry(path.stat().st_size, sha256(path)) for path in paths}


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    match = _FOLDER.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is not named as a checkpoint"
    return int(match[1])


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest complete one of a run folder.

    Raises:
        UsageError: there is none.
    """
    if is_checkpoint(path):
        return path
    complete = complete_checkpoints(path / "checkpoints")
    if not complete:
        hint = "give a run folder that has saved once, or a checkpoints/step-N of it"
        raise UsageError(f"{path} holds no complete checkpoint", hint=hint)
    return complete[-1]
