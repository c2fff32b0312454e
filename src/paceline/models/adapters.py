"""Models with an adapter: how a MODEL or ``--adapter`` names one, and how it is put to use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from paceline.core.errors import UsageError
from paceline.models.decoder import Decoder
from paceline.models.hub import KNOWN, ModelSource, resolve
from paceline.models.peft.attach import MergedWeights, attach, method_of
from paceline.models.peft.files import base_model, is_adapter, open_adapter
from paceline.models.weights import Weights


def resolve_adapted(model: str, adapter: Path | None = None) -> ModelSource:
    """Finds a model that may have an adapter.

    Args:
        model: a MODEL argument, or the folder of an adapter that names its base model.
        adapter: the folder of an adapter for MODEL.

    Raises:
        UsageError: no such model or adapter, or an adapter that does not fit the model.
        DataError: files that are damaged.
    """
    folder = Path(model)
    if model in KNOWN or not is_adapter(folder):
        source = resolve(model)
        return source if adapter is None else _with_adapter(source, adapter)
    if adapter is not None:
        hint = f"give the base model, or leave out --adapter {adapter}"
        raise UsageError(f"{model} is an adapter itself", hint=hint)
    base = base_model(folder)
    try:
        source = resolve(base)
    except UsageError as error:
        hint = f"give the model, and --adapter {model}"
        raise UsageError(f"the base of {model}, {base!r}: {error.message}", hint=hint) from error
    return _with_adapter(replace(source, name=model), folder)


def adapt(decoder: Decoder, source: ModelSource) -> Weights:
    """The weights of a model with its adapter, if it has one.

    What can be merged is merged into the weights; the rest is attached to the decoder.

    Args:
        decoder: of the meta device; changed in place.
        source: of its weights.
    """
    adapter = source.adapter
    if adapter is None:
        return source.weights
    if method_of(adapter.config).why_unmerged:
        return attach(decoder, adapter.config, source.weights, added=adapter).weights
    return MergedWeights(source.spec, adapter.config, source.weights, adapter)


def _with_adapter(source: ModelSource, folder: Path) -> ModelSource:
    return replace(source, adapter=open_adapter(folder, source.spec))
