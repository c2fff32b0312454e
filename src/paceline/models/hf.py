"""Model folders in Hugging Face layout, read and written bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paceline.core.errors import DataError, UsageError
from paceline.models.families import family, spec_from_config
from paceline.models.families.base import Stored
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SAMPLE_BYTES = 1 << 20
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""What a model folder holds beside its weights; a run keeps copies, so that it can be exported."""


class FolderWeights:
    """The weights of a model folder, read one at a time.

    Args:
        folder: holds ``model.safetensors``, or its parts and their index.
        spec: decides the names and shapes that must be there.

    Raises:
        UsageError: no weights, or names or shapes that do not fit `spec`.
        DataError: a file that is not whole.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._map: dict[str, Stored] = family(spec.family).weight_map(spec)
        self._files = {name: file for file in _weight_files(folder) for name in _names_in(file)}
        self._check(folder, spec)

    def read(self, name: str) -> Tensor:
        stored = self._map[name]
        tensors = [self._tensor(published) for published in stored.names]
        value = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        value = value.t() if stored.is_transposed else value
        value = value[0] if stored.is_row else value
        return value if stored.rows is None else value[slice(*stored.rows)]

    def _tensor(self, published: str) -> Tensor:
        with safe_open(self._files[published], framework="pt") as file:
            return file.get_tensor(published)

    def _check(self, folder: Path, spec: ModelSpec) -> None:
        expected = published_shapes(spec, self._map)
        found = {name for name in self._files if not _is_redundant(name, spec)}
        if found != expected.keys():
            missing, unknown = _some(expected.keys() - found), _some(found - expected.keys())
            raise UsageError(
                f"{folder}: weights do not fit config.json: missing {missing}; unknown {unknown}"
            )
        for file in sorted(set(self._files.values())):
            with safe_open(file, framework="pt") as content:
                for name in found & set(content.keys()):
                    shape = tuple(content.get_slice(name).get_shape())
                    if shape != expected[name]:
                        raise UsageError(
                            f"{folder}: {name} has shape {shape}, but config.json implies "
                            f"{expected[name]}"
                        )


def weights_identity(folder: Path) -> str:
    """A hash that tells a folder's weights from others, without reading all of them.

    It is of the size, the first and the last MiB of each file: the first holds names and shapes,
    and what is trained changes everywhere.
    """
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            digest.update(f"{path.name} {size_bytes} ".encode())
            for start in (0, max(0, size_bytes - _SAMPLE_BYTES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def published_shapes(spec: ModelSpec, stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """The shape of every published tensor that a model's parameters are made of."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in build(spec).named_parameters():
        place, shape = stored[name], tuple(parameter.shape)
        if len(place.names) > 1:
            shape = shape[1:]
        if place.rows is not None:  # the part that lies last knows how long the whole is
            shape = (max(place.rows[1], _rows(shapes, place)), *shape[1:])
        shape = shape[::-1] if place.is_transposed else shape
        shape = (1, *shape) if place.is_row else shape
        shapes |= dict.fromkeys(place.names, shape)
    return shapes


def _rows(shapes: Mapping[str, tuple[int, ...]], place: Stored) -> int:
    known = shapes.get(place.names[0], (0,))
    return known[-1] if place.is_transposed else known[0]


def _is_redundant(name: str, spec: ModelSpec) -> bool:
    """Whether a stored tensor holds nothing new: a tied head, or a mask of GPT-2's."""
    if name == "lm_head.weight":
        return spec.tied_embeddings
    return spec.family == "gpt2" and name.endswith((".attn.bias", ".attn.masked_bias"))


def read_text(path: Path) -> str:
    """The text of one of a model's small files.

    Raises:
        UsageError: it is not there.
        DataError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "a model folder holds config.json, model.safetensors and tokenizer.json"
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in one of a model's JSON files.

    Raises:
        UsageError: the file is not there.
        DataError: it does not hold a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} does not hold a JSON object")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    return read_json(folder / "config.json")


def read_spec(folder: Path) -> ModelSpec:
    """The sizes that the folder's config.json states."""
    return spec_from_config(read_config(folder), source=str(folder / "config.json"))


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config.json states for its weights; float32 if it states none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UsageError(f"config.json: dtype {name!r} is no floating-point format of torch")
    return dtype


def write_weights(
    path: Path, spec: ModelSpec, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype
) -> None:
    """Writes a ``model.safetensors`` from our parameter names and whole tensors."""
    stored: dict[str, Stored] = family(spec.family).weight_map(spec)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, value in weights:
        place = stored[name]
        value = value[None] if place.is_row else value
        values = value.unbind() if len(place.names) > 1 else (value,)
        for published, one in zip(place.names, values, strict=True):
            start = place.rows[0] if place.rows else 0
            parts.setdefault(published, []).append((start, one.to(dtype)))
    transposed = {name for place in stored.values() if place.is_transposed for name in place.names}
    tensors: dict[str, Tensor] = {}
    for published, pieces in parts.items():
        whole = torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])])
        tensors[published] = (whole.t() if published in transposed else whole).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.exists():
        return [folder / WEIGHTS_FILE]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise DataError(f"{index} has no weight_map that names the files of the weights")
    return [folder / part for part in sorted(set(parts.values()))]


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file", hint="paceline fetch NAME brings one") from error
    except (SafetensorError, OSError) as error:
        hint = "the file is truncated or damaged: fetch or export it again"
        raise DataError(f"{path} is not a whole safetensors file: {error}", hint=hint) from error


def _some(names: set[str], limit: int = 3) -> str:
    shown = ", ".join(sorted(names)[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
