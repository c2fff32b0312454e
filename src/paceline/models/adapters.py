"""Models with an adapter: how a MODEL or ``--adapter`` names one, and how it is put to use."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from paceline.core.errors import UsageError
from paceline.models.decoder import Decoder
from paceline.models.hub import KNOWN, ModelSource, resolve
from paceline.models.peft.attach import MergedWeights, attach, method_of
from paceline.models.peft.beside import HEAD, Beside, put_beside
from paceline.models.peft.files import Adapter, base_model, is_adapter, named_base, open_adapter
from paceline.models.weights import Weights

_log = logging.getLogger(__name__)


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


def open_beside(source: ModelSource, folders: Mapping[str, str]) -> dict[str, Adapter]:
    """Reads the adapters that are to be served beside each other.

    Args:
        source: of the model.
        folders: name to folder.

    Raises:
        UsageError: one that does not fit the model, or that cannot be served beside others.
        DataError: files that are damaged.
    """
    if folders and source.adapter is not None:
        raise UsageError(
            f"{source.name} has an adapter already, {source.adapter.path}: those of serve.adapters "
            "are for the model without it",
            hint=f"leave it out, and set serve.adapters.NAME = {source.adapter.path}",
        )
    found = {name: open_adapter(Path(folder), source.spec) for name, folder in folders.items()}
    for name, adapter in found.items():
        _require_beside(name, adapter)
        base = named_base(adapter.path)
        if base and Path(base).name != Path(source.name).name:
            _log.warning("adapter %s names %s as its base, not %s", name, base, source.name)
    return found


def put_all_beside(
    decoder: Decoder, source: ModelSource, adapters: Mapping[str, Adapter]
) -> Beside | None:
    """Puts adapters beside a model that has its weights; None where there are none."""
    if not adapters:
        return None
    beside = put_beside(decoder, source.weights, adapters)
    for name, num_bytes in beside.num_bytes.items():
        method = adapters[name].config.method
        _log.info("adapter %s: %s, %.1f MB beside the model", name, method, num_bytes / 1e6)
    return beside


def _require_beside(name: str, adapter: Adapter) -> None:
    """Raises UsageError for an adapter that has to be served alone."""
    method = method_of(adapter.config)
    why = method.why_alone
    if HEAD in adapter.config.targets:
        why = "it adapts the output head, which computes the rows alone that are wanted"
    if why:
        raise UsageError(
            f"serve.adapters.{name}: {adapter.path} ({adapter.config.method}) cannot be served "
            f"beside others: {why}",
            hint=f"serve it alone: --adapter {adapter.path}",
        )


def _with_adapter(source: ModelSource, folder: Path) -> ModelSource:
    return replace(source, adapter=open_adapter(folder, source.spec))
