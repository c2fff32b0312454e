"""A model as another architecture with the same weights, to be trained further."""

from __future__ import annotations

import json
from pathlib import Path

from paceline.core.errors import UnknownNameError, UsageError
from paceline.core.files import new_folder
from paceline.core.registry import NameTable
from paceline.models.families import spec_from_config
from paceline.models.hf import WEIGHTS_FILE, stored_dtype, write_weights
from paceline.models.hub import ModelSource
from paceline.models.ladder_config import as_ladder
from paceline.models.weights import build
from paceline.plan.model_spec import ModelSpec

ARCHITECTURES = NameTable(
    "architecture to convert to", {"ladder": "paceline.models.convert:ladder_config"}
)
"""Name to ``config(source, layers) -> config.json`` of the converted model."""

LAYERS = ("upper-half", "all")


def ladder_config(source: ModelSource, layers: str) -> dict[str, object]:
    """The config.json of a model with a ladder residual in some of its layers.

    Args:
        source: the plain model.
        layers: one of `LAYERS`; of an odd number of layers the upper half has one more.

    Raises:
        UsageError: it is one already, or its norms are such that it cannot be.
    """
    if layers not in LAYERS:
        raise UnknownNameError("choice of layers", layers, LAYERS)
    if source.spec.ladder_from is not None:
        rule = f"its residual is a ladder from layer {source.spec.ladder_from} on already"
        raise UsageError(f"{source.name} cannot be converted: {rule}")
    if source.spec.norm_placement != "before":
        rule = "norms behind sublayers need each output before the next sublayer"
        hint = "a ladder residual is for models with norms before sublayers alone, as Llama's"
        raise UsageError(f"{source.name} cannot be converted: {rule}", hint=hint)
    first_layer = 0 if layers == "all" else source.spec.num_layers // 2
    return as_ladder(json.loads(source.files["config.json"]), first_layer)


def convert(source: ModelSource, to: str, layers: str, target: Path) -> ModelSpec:
    """Writes a model as another architecture, whole or not at all.

    Args:
        source: the model; its weights are written as they are.
        to: one of `ARCHITECTURES`.
        layers: which are converted.
        target: the new folder, in Hugging Face layout.

    Returns:
        The sizes of the converted model.

    Raises:
        UsageError: `target` exists, or a model that cannot be converted.
    """
    config = ARCHITECTURES.load(to)(source, layers)
    if target.exists():
        raise UsageError(f"{target} exists already", hint="convert to a new folder")
    spec = spec_from_config(config, source=f"{source.name} as {to}")
    names = [name for name, _ in build(source.spec).named_parameters()]
    weights = ((name, source.weights.read(name)) for name in names)
    texts = source.files | {"config.json": json.dumps(config, indent=2)}
    with new_folder(target) as folder:
        write_weights(folder / WEIGHTS_FILE, source.spec, weights, stored_dtype(config))
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return spec
