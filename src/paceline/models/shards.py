"""Weights of a model folder in files of a bounded size, and the index that says what is where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from paceline.models.families import family
from paceline.models.families.base import Stored
from paceline.models.hf import INDEX_FILE, WEIGHTS_FILE, write_weights
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

SHARD_BYTES = 5 * 10**9
"""Of a file, as Hugging Face has it."""

Read = Callable[[Sequence[str]], Iterable[tuple[str, Tensor]]]
"""Our names of parameters to them with whole tensors, in any order."""


def write_shards(
    folder: Path,
    spec: ModelSpec,
    read: Read,
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model's weights, one file's worth in memory at a time.

    What fits one file is ``model.safetensors``; else there are several, and an index beside them.

    Args:
        folder: of the model.
        spec: of the model.
        read: gives parameters; asked once for each file.
        dtype: of what is written.
        shard_bytes: that no file's tensors exceed, but for a parameter that does alone; a layer's
            stack of experts is one.
    """
    shards = _shards(spec, dtype, shard_bytes)
    if len(shards) == 1:
        write_weights(folder / WEIGHTS_FILE, spec, read(shards[0]), dtype)
        return
    stored: dict[str, Stored] = family(spec.family).weight_map(spec)
    place_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_weights(folder / file, spec, read(names), dtype)
        place_of |= {published: file for name in names for published in stored[name].names}
    size_bytes = sum(p.numel() for p in build(spec).parameters()) * dtype.itemsize
    index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(place_of.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(spec: ModelSpec, dtype: torch.dtype, shard_bytes: int) -> list[list[str]]:
    """Parameters by file, in the model's order; those of one published tensor are together."""
    shards: list[list[str]] = [[]]
    filled = 0
    for names, size_bytes in _units(spec, dtype):
        if shards[-1] and filled + size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += names
        filled += size_bytes
    return shards


def _units(spec: ModelSpec, dtype: torch.dtype) -> list[tuple[list[str], int]]:
    """Parameters that share published tensors, and their bytes."""
    stored: dict[str, Stored] = family(spec.family).weight_map(spec)
    units: dict[str, list[str]] = {}  # by their first published tensor
    sizes_bytes: dict[str, int] = {}
    for name, parameter in build(spec).named_parameters():
        first = stored[name].names[0]
        units.setdefault(first, []).append(name)
        size_bytes = parameter.numel() * dtype.itemsize
        sizes_bytes[first] = sizes_bytes.get(first, 0) + size_bytes
    return [(names, sizes_bytes[first]) for first, names in units.items()]
