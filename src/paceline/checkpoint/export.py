"""A checkpoint's model as a folder in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.checkpoint.manifest import read_manifest
from paceline.checkpoint.store import load_whole
from paceline.core.errors import UsageError
from paceline.core.files import new_folder
from paceline.models.hf import WEIGHTS_FILE, stored_dtype, write_weights
from paceline.plan.model_spec import ModelSpec

_PREFIX = "model."


def export(checkpoint: Path, files: dict[str, str], target: Path) -> None:
    """Writes a model folder, whole or not at all, in the dtype that its config.json states.

    Args:
        checkpoint: a complete checkpoint.
        files: the small files of the model folder, config.json among them.
        target: the new folder.

    Raises:
        UsageError: `target` exists.
        DataError: the checkpoint is damaged.
    """
    if target.exists():
        raise UsageError(f"{target} exists already", hint="export to a new folder")
    spec = ModelSpec.from_dict(read_manifest(checkpoint).model)
    dtype = stored_dtype(json.loads(files["config.json"]))
    tensors = load_whole(checkpoint, _PREFIX)
    with new_folder(target) as folder:
        weights = ((name.removeprefix(_PREFIX), value) for name, value in tensors.items())
        write_weights(folder / WEIGHTS_FILE, spec, weights, dtype)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
