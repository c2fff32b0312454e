"""Model folders in Hugging Face layout, read and written bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paceline.core.errors import DataError, UsageError
from paceline.models.families import family, spec_from_config
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
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
        self._names = family(spec.family).weight_names(spec)
        self._files = {name: file for file in _weight_files(folder) for name in _names_in(file)}
        self._check(folder, spec)

    def read(self, name: str) -> Tensor:
        published = self._names[name]
        with safe_open(self._files[published], framework="pt") as file:
            return file.get_tensor(published)

    def _check(self, folder: Path, spec: ModelSpec) -> None:
        expected = set(self._names.values())
        # A tied head that is stored all the same is a copy of the embedding.
        found = set(self._files) - ({"lm_head.weight"} if spec.tied_embeddings else set())
        if found != expected:
            missing, unknown = _some(expected - found), _some(found - expected)
            raise UsageError(
                f"{folder}: weights do not fit config.json: missing {missing}; unknown {unknown}"
            )
        for name, parameter in build(spec).named_parameters():
            published = self._names[name]
            with safe_open(self._files[published], framework="pt") as file:
                shape = tuple(file.get_slice(published).get_shape())
            if shape != tuple(parameter.shape):
                raise UsageError(
                    f"{folder}: {published} has shape {shape}, but config.json implies "
                    f"{tuple(parameter.shape)}"
                )


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
    names = family(spec.family).weight_names(spec)
    tensors = {names[name]: value.to(dtype).contiguous() for name, value in weights}
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
