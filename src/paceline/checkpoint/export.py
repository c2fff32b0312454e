"""A checkpoint's model as a folder in Hugging Face layout, or its adapter as one of `peft`'s."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from paceline.checkpoint.load import WholeTensors, load_whole
from paceline.checkpoint.manifest import Manifest, read_manifest
from paceline.core.errors import UsageError
from paceline.core.files import new_folder
from paceline.models.hf import stored_dtype
from paceline.models.peft.attach import MergedWeights
from paceline.models.peft.files import write_adapter
from paceline.models.shards import SHARD_BYTES, Read, write_shards
from paceline.models.weights import TensorWeights, Weights
from paceline.plan.model_spec import ModelSpec
from paceline.plan.plan import PeftConfig, Plan

_PREFIX = "model."


def export(
    checkpoint: Path, files: dict[str, str], target: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a model folder, whole or not at all, in the dtype that its config.json states.

    One file's worth of weights is in memory at a time.

    Args:
        checkpoint: a complete checkpoint of a run that trained the model itself.
        files: the small files of the model folder, config.json among them.
        target: the new folder.
        shard_bytes: of weights in a file; a larger model has several and an index.

    Raises:
        UsageError: `target` exists.
        DataError: the checkpoint is damaged.
    """
    _require_new(target)
    whole = WholeTensors(checkpoint)
    spec = ModelSpec.from_dict(whole.manifest.model)

    def read(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        tensors = whole.read(_PREFIX + name for name in names)
        return ((name.removeprefix(_PREFIX), value) for name, value in tensors.items())

    _write_model(target, spec, read, files, shard_bytes)


def export_adapter(checkpoint: Path, base: str, target: Path) -> None:
    """Writes an adapter's folder, as `peft` reads it, whole or not at all.

    Args:
        checkpoint: a complete checkpoint of a run that trained an adapter.
        base: the MODEL that it was trained for.
        target: the new folder.

    Raises:
        UsageError: `target` exists, or the format cannot hold the adapter.
        DataError: the checkpoint is damaged.
    """
    _require_new(target)
    spec, peft, tensors = _adapter(checkpoint)
    with new_folder(target) as folder:
        write_adapter(folder, spec, peft, base, tensors)


def export_merged(checkpoint: Path, base: Weights, files: dict[str, str], target: Path) -> None:
    """Writes a model folder with an adapter merged into the weights, whole or not at all.

    Args:
        checkpoint: a complete checkpoint of a run that trained an adapter.
        base: weights of the MODEL that it was trained for.
        files: the small files of the model folder, config.json among them.
        target: the new folder.

    Raises:
        UsageError: `target` exists, or an adapter that cannot be merged.
        DataError: the checkpoint is damaged.
    """
    _require_new(target)
    spec, peft, tensors = _adapter(checkpoint)
    merged = MergedWeights(spec, peft, base, TensorWeights(tensors))

    def read(names: Sequence[str]) -> Iterable[tuple[str, Tensor]]:
        return ((name, merged.read(name)) for name in names)

    _write_model(target, spec, read, files, SHARD_BYTES)


def peft_of(manifest: Manifest) -> PeftConfig:
    """What a run of the checkpoint's added to its model."""
    return Plan.from_dict(manifest.plan).peft


def _require_new(target: Path) -> None:
    if target.exists():
        raise UsageError(f"{target} exists already", hint="export to a new folder")


def _adapter(checkpoint: Path) -> tuple[ModelSpec, PeftConfig, dict[str, Tensor]]:
    """The model that was adapted, how, and the new parameters."""
    manifest = read_manifest(checkpoint)
    return ModelSpec.from_dict(manifest.model), peft_of(manifest), _parameters(checkpoint)


def _parameters(checkpoint: Path) -> dict[str, Tensor]:
    tensors = load_whole(checkpoint, _PREFIX)
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}


def _write_model(
    target: Path, spec: ModelSpec, read: Read, files: dict[str, str], shard_bytes: int
) -> None:
    dtype = stored_dtype(json.loads(files["config.json"]))
    with new_folder(target) as folder:
        write_shards(folder, spec, read, dtype, shard_bytes=shard_bytes)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
